"""A model of a run for lm-evaluation-harness (the package `lm_eval`, extra `eval`)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from train.errors import UserError, import_extra, one_line
from train.scoring import Scorer


def make_harness_model(scorer: Scorer) -> Any:
    """The `lm_eval.api.model.LM` of a scorer. Raises UserError where the package is not installed."""
    base = import_extra("lm_eval.api.model", "eval").LM

    class HarnessModel(base):
        def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
            return scorer.loglikelihoods([scorer.encode_pair(*request.args) for request in requests])

        def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
            return [scorer.rolling(scorer.tokenizer.encode(request.args[0]).tolist()) for request in requests]

        def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
            results = []
            for request in requests:
                context, options = request.args
                if options.get("do_sample") and options.get("temperature", 1):
                    raise UserError(f"a task samples ({options}): only greedy tasks are run, expected do_sample: false")
                until = options.get("until") or []
                until = [until] if isinstance(until, str) else until
                tokens = [*scorer.prefix, *scorer.tokenizer.encode(context).tolist()]
                results.append((tokens, tuple(until), options.get("max_gen_toks", 256)))
            texts = [""] * len(requests)
            for kind in dict.fromkeys(one[1:] for one in results):  # equal options go in one batch
                numbers = [number for number, one in enumerate(results) if one[1:] == kind]
                found = scorer.continuations([results[number][0] for number in numbers], *kind)
                for number, text in zip(numbers, found):
                    texts[number] = text
            return texts

    return HarnessModel()


def run_tasks(
    scorer: Scorer, tasks: Sequence[str], include_path: Path | None, num_fewshot: int | None, limit: int | None
) -> dict[str, Any]:
    """The results of tasks by name; `include_path` is a directory of task files. Raises UserError for unknown ones."""
    lm = make_harness_model(scorer)
    evaluator, managers = (import_extra(f"lm_eval.{name}", "eval") for name in ("evaluator", "tasks"))
    manager = managers.TaskManager(include_path=None if include_path is None else str(include_path))
    unknown = [task for task in tasks if task not in manager.all_tasks]
    if unknown:
        raise UserError(
            f"--tasks: lm_eval knows no {', '.join(unknown)}; give --include_path for task files of your own"
        )
    try:
        found = evaluator.simple_evaluate(
            model=lm, tasks=list(tasks), task_manager=manager, num_fewshot=num_fewshot, limit=limit, bootstrap_iters=0
        )
    except (OSError, ConnectionError) as error:
        raise UserError(f"--tasks: a data set cannot be read ({one_line(error)}): is it on this disk?") from error
    return found["results"]
