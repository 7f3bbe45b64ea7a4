"""The story as text: for the terminal, and as `report.md` beside the circuit's files."""

from circuits.demo.story import Story, state_layer_note
from hooks.demo.world import HEADLINE_CITY, OTHER_CITY, STATE_OF_CITY
from hooks.readout import RankedToken

SHOWN_MOVES = 5


def terminal(story: Story) -> str:
    """What `circuits demo` prints."""
    return "\n".join(
        f"{title}\n" + "\n".join(f"    {line}" for line in lines) + "\n" for title, lines in sections(story)
    )


def markdown(story: Story, seconds: float) -> str:
    """`report.md`."""
    parts = [
        "# What the embedded model does, and how we know",
        f"`{story.prompt}`",
        "![the circuit](circuit.png)",
    ]
    for title, lines in sections(story):
        parts += [f"## {title}", "\n".join(f"- {line}" for line in lines)]
    parts.append(f"Made by `circuits demo` in {seconds:.0f} s. Every number here was measured by this run.")
    return "\n\n".join(parts) + "\n"


def sections(story: Story) -> list[tuple[str, list[str]]]:
    """Titles and lines, for either form."""
    return [
        ("1. The question", _question(story)),
        ("2. The features that carry the state", _carriers(story)),
        ("3. Zero them", _ablation(story)),
        ("4. Set another state's features instead", _swap(story)),
        ("5. The circuit, and how far it is right", _circuit(story)),
        ("6. How good the transcoders are", _quality(story)),
    ]


def _question(story: Story) -> list[str]:
    hop = story.two_hop
    return [
        f"{story.prompt} →{_tokens(story.top[:3])}",
        f"capital questions answered right: {hop.trained:.1%} of trained cities, "
        f"{hop.held_out:.1%} of cities whose capital question was never trained ({HEADLINE_CITY} is one)",
    ]


def _carriers(story: Story) -> list[str]:
    state = STATE_OF_CITY[HEADLINE_CITY]
    lines = [f"{state_layer_note(story)}, chosen on trained cities and other wordings"]
    for carrier in story.carriers:
        lines.append(
            f"{carrier.address}: activation {carrier.activation:.2f} here; "
            f"average precision as a detector of {state} {carrier.precision:.2f}"
        )
    return lines


def _ablation(story: Story) -> list[str]:
    here, mean = story.ablation_here, story.ablation
    return [
        f"logit {here.baseline.logit:.2f} → {here.edited.logit:.2f}, probability {here.baseline.prob:.3f} → "
        f"{here.edited.prob:.3f}, rank {here.baseline.rank} → {here.edited.rank}; "
        f"now →{_tokens(story.top_ablated[:2])}",
        f"over all 50 held-out cities: own answer {mean.answer:+.2f} logits, the 49 other capitals {mean.others:+.2f}",
    ]


def _swap(story: Story) -> list[str]:
    examples = "; ".join(f"{state} →{answer}" for state, answer, _ in story.moved[:SHOWN_MOVES])
    swap = story.swap
    return [
        f"{HEADLINE_CITY}: {examples}; …",
        f"{HEADLINE_CITY} goes to the right capital for {story.moved_share:.0%} of the 49 other states",
        f"all {swap.pairs:,} ordered pairs of held-out cities: {swap.success:.1%} give the other capital",
        f"controls: a third state's features {swap.third_state:.1%} (the third capital: {swap.third_lands:.1%}), "
        f"random features {swap.random:.1%}",
    ]


def _circuit(story: Story) -> list[str]:
    check = story.graph.meta["verification"]
    return [
        f"{story.graph.n_nodes} nodes and {story.graph.n_edges} edges explain {check['metric']}: what {HEADLINE_CITY} "
        f"does that {OTHER_CITY} in its place would not",
        f"{check['n']} features really set to what they are there: Spearman of score and effect "
        f"{check['node_spearman']:.2f}, noise floor {check['noise_floor']:.1e} logits",
        f"{check['n_edges']} edges, their source taken out and one block run: Spearman {check['edge_spearman']:.2f}",
        f"share of the edges' sums that the exact rule leaves over: {story.graph.meta['remainder_share']:.0%}",
        f"files: {', '.join(path.name for path in story.files)}",
    ]


def _quality(story: Story) -> list[str]:
    sites = ", ".join(f"{site.layer}: {site.fvu:.3f}" for site in story.quality)
    hop = story.swapped_accuracy
    return [
        f"variance unexplained per layer on sentences no training text holds: {sites}",
        f"all sites but the first replaced, error dropped: {hop.trained:.1%} (trained) and "
        f"{hop.held_out:.1%} (held out) of capital questions still right",
    ]


def _tokens(tokens: tuple[RankedToken, ...]) -> str:
    return ",".join(f"{token.token} ({token.prob:.3f})" for token in tokens)
