"""How edges are formed, below the rules: cuts, recorded blocks, gradients that are carried down them."""
