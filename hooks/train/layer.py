"""One layer's transcoder while it is trained: parameters, moments of AdamW, when each feature was last active."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from hooks.errors import TrainingError
from hooks.sites import SiteSpec
from hooks.train.recipe import Recipe
from hooks.transcoder import Transcoder

EPS = 1e-5  # of the LayerNorm in front of the encoder
BETAS = (0.9, 0.999)
ROWS_AT_ONCE = 2048  # of what is measured

Pair = tuple[Float[Tensor, "token d_model"], Float[Tensor, "token d_model"]]


@dataclass(frozen=True)
class Figures:
    """How good a layer is on some tokens.

    Attributes:
        fvu: the share of the variance that is not explained, Σ|y − ŷ|² / Σ|y − mean|².
        l0: active features of a token, the mean.
        dead: features that are active at none of the tokens (while training: at none of the last `dead_after`).
    """

    fvu: float
    l0: float
    dead: int


class TrainedLayer:
    """A transcoder in training.

        pre = LayerNorm(x) @ W_encᵀ + b_enc      a = relu(TopK(pre))      ŷ = scale · (a @ W_dec + b_dec)

    Targets are divided by `scale`, the root mean square of y − mean over tokens and dimensions, so that one learning
    rate fits every layer. Rows of the decoder have norm 1 at all times.
    """

    def __init__(self, layer: int, recipe: Recipe, tensors: Mapping[str, Tensor], steps: int = 0):
        self.layer, self.recipe, self.steps = layer, recipe, steps
        device = tensors["W_enc"].device
        self.W_enc, self.b_enc, self.W_dec, self.b_dec = (
            tensors[name].clone().requires_grad_() for name in ("W_enc", "b_enc", "W_dec", "b_dec")
        )
        self.scale: Tensor = tensors["scale"]
        self.idle: Int[Tensor, " feature"] = tensors["idle"].clone()
        parameters = [self.W_enc, self.b_enc, self.W_dec, self.b_dec]
        self.optimizer = torch.optim.AdamW(parameters, lr=0.0, betas=BETAS, weight_decay=0.0, fused=True)
        for parameter, name in zip(parameters, ("W_enc", "b_enc", "W_dec", "b_dec"), strict=True):
            if f"{name}.mean" in tensors:
                self.optimizer.state[parameter] = {
                    "step": torch.tensor(float(steps), device=device),
                    "exp_avg": tensors[f"{name}.mean"].clone(),
                    "exp_avg_sq": tensors[f"{name}.square"].clone(),
                }

    @classmethod
    def started(cls, layer: int, recipe: Recipe, pair: Pair) -> "TrainedLayer":
        """From some tokens: encoder rows are normed inputs, decoder rows what is to be reconstructed there, both scaled
        so that the first reconstruction is the best that one factor allows."""
        x, y = (part.float() for part in pair)
        generator = torch.Generator().manual_seed(_seed(recipe, layer))
        mean = y.mean(0)
        scale = (y - mean).square().mean().sqrt()
        if not bool(torch.isfinite(scale)) or float(scale) == 0:
            raise TrainingError(f"what layer {layer} writes does not vary, or is no number", found=str(float(scale)))
        chosen = torch.randint(0, len(x), (recipe.d_features,), generator=generator).to(x.device)
        noise = 0.1 * _unit(torch.randn(recipe.d_features, x.shape[1], generator=generator)).to(x.device)
        W_enc = nn.functional.normalize(
            nn.functional.normalize(_normed(x[chosen]), dim=-1) + noise / x.shape[1] ** 0.5, dim=-1
        )
        W_dec = nn.functional.normalize(
            nn.functional.normalize(y[chosen] - mean, dim=-1) + noise / x.shape[1] ** 0.5, dim=-1
        )
        b_enc, b_dec = torch.zeros(recipe.d_features, device=x.device), mean / scale
        few = slice(0, ROWS_AT_ONCE)
        made = _kept(nn.functional.linear(_normed(x[few]), W_enc), recipe.k)[0] @ W_dec
        wanted = (y[few] - mean) / scale
        factor = ((made * wanted).sum() / made.square().sum()).clamp(min=1e-3)
        idle = torch.zeros(recipe.d_features, dtype=torch.int64, device=x.device)
        tensors = {
            "W_enc": factor * W_enc,
            "b_enc": b_enc,
            "W_dec": W_dec,
            "b_dec": b_dec,
            "scale": scale,
            "idle": idle,
        }
        return cls(layer, recipe, tensors)

    def step(self, pair: Pair, seen: int, *, half: bool) -> None:
        """One step of AdamW.

        Args:
            pair: what is read and what is to be written.
            seen: tokens before this step.
            half: form the products in bf16.

        Raises:
            TrainingError: the loss is not a number.
        """
        x, y = (part.float() for part in pair)
        recipe, wanted = self.recipe, y / self.scale
        dead = self.idle > recipe.dead_after
        with torch.autocast(x.device.type, torch.bfloat16, enabled=half):
            pre = nn.functional.linear(_normed(x), self.W_enc).float() + self.b_enc
            acts, kept = _kept(pre, recipe.k)
            error = wanted - (acts @ self.W_dec).float() - self.b_dec
            loss = error.square().mean()
            if recipe.auxiliary and bool(dead.any()):
                loss = loss + recipe.auxiliary * self._revival(pre, error.detach(), dead)
        if not bool(torch.isfinite(loss)):
            raise TrainingError(
                f"the loss of layer {self.layer} is not a number",
                where=f"step {self.steps}",
                repair="a lower learning rate (--learning-rate); the last saved state is kept",
            )
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([self.W_enc, self.b_enc, self.W_dec, self.b_dec], recipe.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = recipe.rate(seen, self.steps)
        self.optimizer.step()
        with torch.no_grad():
            self.W_dec.copy_(_unit(self.W_dec))
            self.idle = torch.where(kept.any(0), 0, self.idle + len(x))
        self.steps += 1

    def _revival(
        self,
        pre: Float[Tensor, "token feature"],
        error: Float[Tensor, "token d_model"],
        dead: Bool[Tensor, " feature"],
    ) -> Float[Tensor, ""]:
        """What the strongest dead features leave of the error, over the error.

        Without their bias, which may have shut them off: its gradient is that of an active feature all the same.
        """
        rows = dead.nonzero()[:, 0]
        opened = pre[:, rows] - self.b_enc.detach()[rows]
        acts, _ = _kept(opened, min(len(rows), max(1, pre.shape[1] // 8)))
        left = error - (acts @ self.W_dec[rows]).float()
        return left.square().mean() / error.square().mean().clamp(min=1e-12)

    @torch.no_grad()
    def figures(self, pair: Pair) -> Figures:
        """On tokens that are not trained on: with the transcoder as it is saved."""
        coder = self.transcoder()
        y = pair[1].float()
        left, active = 0.0, torch.zeros(coder.d_features, dtype=torch.bool)
        count = 0
        for x_part, y_part in zip(pair[0].split(ROWS_AT_ONCE), y.split(ROWS_AT_ONCE), strict=True):
            acts = coder.encode(x_part.float())
            left += float((y_part - coder.decode(acts)).square().double().sum())
            on = acts.values > 0
            count += int(on.sum())
            active[acts.indices[on].cpu()] = True
        return Figures(left / float((y - y.mean(0)).square().double().sum()), count / len(y), int((~active).sum()))

    def transcoder(self) -> Transcoder:
        """The transcoder as it is now. `scale` is in the encoder and in b_dec: an activation is a length in the
        stream."""
        read, write = SiteSpec.parse(self.recipe.read), SiteSpec.parse(self.recipe.write)
        W_enc, b_enc, W_dec, b_dec = (t.detach() for t in (self.W_enc, self.b_enc, self.W_dec, self.b_dec))
        ones = torch.ones_like(b_dec)
        return Transcoder(
            layer=self.layer,
            read=read.at(self.layer),
            write=write.at(self.layer),
            W_enc=W_enc * self.scale,
            b_enc=b_enc * self.scale,
            W_dec=W_dec.clone(),
            b_dec=b_dec * self.scale,
            norm_weight=ones,
            norm_bias=torch.zeros_like(ones),
            norm_eps=EPS,
            k=self.recipe.k,
        )

    def tensors(self) -> dict[str, Tensor]:
        """Everything a resumed training needs, on the CPU."""
        out = {"scale": self.scale, "idle": self.idle}
        for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
            parameter = getattr(self, name)
            out[name] = parameter.detach()
            if state := self.optimizer.state.get(parameter):
                out |= {f"{name}.mean": state["exp_avg"], f"{name}.square": state["exp_avg_sq"]}
        return {name: tensor.cpu().contiguous() for name, tensor in out.items()}

    @staticmethod
    def nbytes(d_model: int, d_features: int) -> int:
        """Memory of a layer in training: parameters, gradients and two moments in fp32."""
        return 16 * (2 * d_model * d_features + d_model + d_features) + 8 * d_features


def _normed(x: Float[Tensor, "token d_model"]) -> Float[Tensor, "token d_model"]:
    return nn.functional.layer_norm(x, x.shape[-1:], eps=EPS)


def _unit(rows: Float[Tensor, "row d_model"]) -> Float[Tensor, "row d_model"]:
    return nn.functional.normalize(rows, dim=-1)


def _kept(
    pre: Float[Tensor, "token feature"], k: int
) -> tuple[Float[Tensor, "token feature"], Bool[Tensor, "token feature"]]:
    """TopK, then ReLU, as a dense table; and which features are active."""
    values, indices = pre.topk(k, dim=-1, sorted=False)
    acts = torch.zeros_like(pre).scatter(-1, indices, values.relu())
    return acts, acts > 0


def _seed(recipe: Recipe, layer: int) -> int:
    return 1_000_003 * recipe.seed + layer
