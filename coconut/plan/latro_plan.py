"""What a LaTRO run will do, before it does: where it goes on from, its updates, what it needs."""

from coconut.batches.latro_prompts import Data, check_room
from coconut.batches.questions import DataSet
from coconut.config.latro_keys import LatroConfig
from coconut.plan.memory import evaluation_bytes, too_large, training_bytes
from coconut.plan.unbuilt import find_model, to_fetch
from coconut.reporting.console import Console
from coconut.run.changed import changed_keys, changed_lines
from coconut.run.latro.resume import plan_lines, resumed_from, warm_weights, whole_update


def print_latro_plan(config: LatroConfig, twin: str, n_processes: int = 1) -> list[str]:
    """Check everything that needs no weights and print the plan of a LaTRO run.

    n_processes: how many the run is spread over. Of a model of the hub only what describes it is
    fetched. Returns what was said of batches that are too large for this machine. Raises UserError.
    """
    given, last = config, resumed_from(config)
    config = whole_update(given, n_processes)
    warm = warm_weights(config)
    changed = changed_keys(given, last or warm)
    model, console = find_model(config, last, twin), Console()
    shape = model.shape
    large: list[str | None] = []
    size = f"{shape.n_params / 1e6:.1f}M params" if shape else "size unknown"
    lines = [f"{twin} | {model.name} | {size} | run {config.name} | latro, preset {config.preset}"]
    lines += filter(
        None, (model.note, *config.notes, to_fetch(config, last), *changed_lines(changed))
    )
    if model.tokenizer is None:
        lines += plan_lines(config, len(DataSet(config).numbered("train")), n_processes)
    else:
        data = Data(config, model.tokenizer)
        lines += plan_lines(config, len(data.train), n_processes)
        lines.append(
            f"evaluates {min(config.evaluation_items, len(data.validation)):,} of"
            f" {len(data.validation):,} items of {data.path('validation')}"
            + (" held out of train" if data.is_held_out else "")
        )
        if config.warm_start_updates and warm is None:
            lines.append(
                f"warm start: {config.warm_start_updates:,} updates of {config.warm_start_batch}"
                f" rows on {len(data.written_rows()):,} written rationales"
            )
        if config.latro_latents:
            lines.append(f"{config.latro_latents} thoughts before every rationale")
        if config.adapter:
            lines.append(f"trains {config.adapter.type} of rank {config.adapter.rank} alone")
        if config.test_at_end:
            lines.append(
                f"the best checkpoint answers {len(data.test):,} items of {data.path('test')}, once"
            )
        longest = max(len(data.prompt(i).ids) + len(i["response_ids"]) for i in data.train)
        L = config.response_length
        lines.append(
            f"longest row {longest + L} tokens: prompt and answer {longest}, rationale {L}"
        )
        if shape is not None:
            check_room(data, data.splits, shape.n_positions)
            rows = config.batch_size_training
            step = training_bytes(shape, rows, longest + L, rows * (L + longest), config)
            step += 4 * shape.n_params * (config.kl_coef > 0)
            draw = evaluation_bytes(shape, config.rollout_batch_size, longest, L, config.bf16)
            lines.append(
                f"estimated peak memory: update {step / 1e9:.2f} GB, sampling {draw / 1e9:.2f} GB"
            )
            large = [
                too_large(step, "batch_size_training"),
                too_large(draw, "rollout_batch_size"),
            ]
    found = list(filter(None, large))
    for line in [*lines, *found]:
        console.say(line)
    console.say("checked: no model was built, no weights were downloaded, nothing was written")
    return found
