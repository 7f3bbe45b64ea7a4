"""Prompts and interventions → new tokens, by one of two engines that give the same tokens.

`dynamic`: a cache that grows, edits that are attached for each pass. It does everything.
`static`: `FastDecoder`, whose cache and tables have a fixed size; on CUDA each token is one CUDA graph. It continues
one prompt, and does not do everything.
"""

from collections.abc import Iterator, Sequence

from hooks.errors import UserError
from hooks.generation.decoding import Generated, Token, check_length, generate
from hooks.generation.fast import FastDecoder, check_suited
from hooks.generation.observe import Observer, observed_layers
from hooks.generation.options import GenerateOptions
from hooks.generation.sampling import stop_strings
from hooks.generation.session import Session
from hooks.host import Batch, Host, Prompt, choose_precision, exclusive, is_half
from hooks.passes import HostAndStore, Interventions, Plan, lists_per_row, make_plan
from hooks.types import Edit, Engine

STATIC_FROM = 16  # new tokens, from where `static` is the default on CUDA: making the graph costs five passes


@exclusive
def continued(
    model: HostAndStore,
    prompts: Sequence[Prompt],
    interventions: Interventions,
    options: GenerateOptions,
    behind: Sequence[Edit] = (),
) -> list[Generated]:
    """Continue every prompt, each as if it were alone.

    Args:
        interventions: of every row, or a list of lists, one per row.
        behind: edits behind those of the interventions.

    Raises:
        UserError: as `HookedModel.generate`.
    """
    host, store = model.host, model.store
    batch = host.batch(prompts)
    new = check_length(host, max(batch.lengths), options.max_new_tokens)
    per_row = lists_per_row(interventions, len(batch.lengths))
    precision, samplings = choose_precision(host, options.precision), options.samplings(len(batch.lengths))
    layers = observed_layers(store, options.observe)
    if engine_for(model, batch, per_row, options, behind) == "static":
        fast = prefilled(model, batch, per_row[0], options)
        return [fast.generate(new, sampling=samplings[0], stop=options.stop)]
    return generate(
        host,
        batch,
        [*options.edits(host, store, batch, per_row, new), *behind],
        max_new_tokens=new,
        sampling=samplings,
        stops=stop_strings(options.stop),
        observer=Observer(store, layers) if layers else None,
        use_cache=options.use_cache,
        precision=precision,
    )


def streamed(
    model: HostAndStore, prompt: Prompt, interventions: Interventions, options: GenerateOptions
) -> Iterator[Token]:
    """The new tokens of one prompt, as they come.

    Raises:
        UserError: as `HookedModel.stream`, at once and not with the first token.
    """
    session = open_session(model, prompt, interventions, options, options.max_new_tokens)
    batch = model.host.batch([prompt])
    if engine_for(model, batch, [interventions], options) == "static":
        return _streamed_statically(model, batch, interventions, options)
    return session.stream(options.max_new_tokens, stop=options.stop)


def _streamed_statically(
    model: HostAndStore, batch: Batch, interventions: Interventions, options: GenerateOptions
) -> Iterator[Token]:
    fast = prefilled(model, batch, interventions, options)
    yield from fast.stream(options.max_new_tokens, sampling=options.samplings(1)[0], stop=options.stop)


def open_session(
    model: HostAndStore,
    prompt: Prompt,
    interventions: Interventions,
    options: GenerateOptions,
    new_tokens: int | None,
) -> Session:
    """A generation that has not begun.

    Args:
        new_tokens: how many will follow at most; None: what the context holds.

    Raises:
        UserError: as `HookedModel.session`.
    """
    host, batch = model.host, model.host.batch([prompt])
    if new_tokens is not None:
        new_tokens = check_length(host, batch.lengths[0], new_tokens)
    room = host.max_positions - batch.lengths[0] if new_tokens is None else new_tokens

    def make(items: Interventions) -> list[Edit]:
        return options.edits(host, model.store, batch, [items], room)

    precision = choose_precision(host, options.precision)
    return Session(host, batch, make, interventions, options.samplings(1)[0], precision)


# -- which engine ------------------------------------------------------------------------------------------------------


def engine_for(
    model: HostAndStore,
    batch: Batch,
    per_row: Sequence[Interventions],
    options: GenerateOptions,
    behind: Sequence[Edit] = (),
) -> Engine:
    """The engine that is asked for. By default `static` on CUDA where it applies and pays, else `dynamic`.

    Raises:
        UserError: `static` is asked for, and cannot do the rest of what is asked for.
        ModelError: it is asked for, and does not work on this model.
    """
    host, store = model.host, model.store
    if options.engine == "dynamic" or (options.engine is None and not _pays(host, options)):
        return "dynamic"
    layers = {*_plan(model, batch, per_row[0], options).tables, *options.layers(store)}
    try:
        _check_asked(host, len(batch.lengths), options, behind)
        check_suited(host, store, layers, batch.lengths[0] + options.max_new_tokens)
    except UserError:
        if options.engine == "static":
            raise
        return "dynamic"
    return "static" if options.engine == "static" or (_capturable(host) and _fits(model, layers)) else "dynamic"


def prefilled(model: HostAndStore, batch: Batch, interventions: Interventions, options: GenerateOptions) -> FastDecoder:
    """A decoder with room for exactly what is asked for, which has read the prompt."""
    length = batch.lengths[0]
    tables = _plan(model, batch, interventions, options).tables
    fast = FastDecoder(
        model,
        layers=tuple(tables),
        capacity=max((len(table.features) for table in tables.values()), default=1),
        replace=options.layers(model.store) if options.error == "zero" else (),
        max_length=length + options.max_new_tokens,
    )
    fast.set(interventions)
    fast.prefill(batch.ids[0, :length].tolist())
    return fast


def _plan(model: HostAndStore, batch: Batch, interventions: Interventions, options: GenerateOptions) -> Plan:
    return make_plan(model.store, [interventions], batch.lengths[:1], new_tokens=options.max_new_tokens)


def _check_asked(host: Host, rows: int, options: GenerateOptions, behind: Sequence[Edit]) -> None:
    """Refuse what the static engine does not do.

    Raises:
        UserError: naming everything of this kind that is asked for.
    """
    asked = {
        f"{rows} prompts": rows > 1,
        f"mask={options.mask!r}": options.mask != "frozen",
        "positions= or skip=": options.error == "zero" and not options.where.everywhere,
        "observe=": bool(options.observe),
        "lens_hooks=": bool(behind),
        "use_cache=False": not options.use_cache,
        "precision='exact'": options.precision == "exact" and is_half(host),
    }
    found = [name for name, is_asked in asked.items() if is_asked]
    if found:
        raise UserError(
            "the static engine does not do what is asked for",
            expected="one prompt, in native precision and with a cache; interventions; sites replaced at every token",
            found=", ".join(found),
            repair='engine="dynamic" (--engine dynamic)',
        )


def _pays(host: Host, options: GenerateOptions) -> bool:
    """Whether a CUDA graph is made, and saves more than it costs to make."""
    return host.device.type == "cuda" and options.max_new_tokens >= STATIC_FROM


def _capturable(host: Host) -> bool:
    """Whether a CUDA graph of a pass is known to work. A quantised product or another attention may make the CPU wait
    for a number, which a graph cannot do."""
    config = host.model.config
    quantised = getattr(config, "quantization_config", None) is not None
    return not quantised and getattr(config, "_attn_implementation", None) in ("sdpa", "eager")


def _fits(model: HostAndStore, layers: set[int]) -> bool:
    """Whether all layers that are needed may be resident at once."""
    budget = model.store.budget_bytes
    return budget is None or sum(model.store.bytes_of(layer) for layer in layers) <= budget
