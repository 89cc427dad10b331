"""A metric of the user's own, over the answers of a tuned model to rows that were held out.

`task.metric: module:function` names it: a function of two lists of texts, the answers and what the rows have, to a
number or to a mapping of names to numbers.
"""

import importlib
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any, Literal

from hosl.config import Config
from hosl.errors import ConfigError, FailureError
from hosl.inference.local import ready_model
from hosl.inference.text_model import TextModel, Wanted
from hosl.split import transformers_tokenizer
from hosl.system.atomic import whole_file
from hosl.system.run_folder import OWN_METRIC
from hosl.tasks import SftConfig, TextTokenizer
from hosl.tasks.sft.formats import Question
from hosl.tasks.sft.task import held_out_questions


@dataclass(frozen=True)
class OwnMetric:
    """The function that `task.metric` names, and the held-out rows whose answers it judges."""

    task: SftConfig
    function: Callable[[list[str], list[str]], Any]
    questions: Sequence[Question]
    """At most `task.metric_rows` rows."""

    @property
    def note(self) -> str:
        """The line that is said before a run."""
        return (
            f"task.metric: {self.task.metric} will judge the answers to {self.task.metric_rows} held-out rows at most, "
            f"each of {self.task.metric_tokens} tokens at most, the most probable ones"
        )

    def of_run(
        self, run: Path, *, best: bool = False, done: Callable[[int], None] = lambda count: None
    ) -> dict[str, float]:
        """The figures over the answers of a run's newest weights, by name.

        Args:
            run: the run's folder.
            best: whether the weights are those of the best evaluation on dev.
            done: is called with the number of rows that are answered.

        Raises:
            FailureError: if the function fails, or returns what is no number.
        """
        ready = ready_model(str(run), best=best)
        tokenizer = TextTokenizer.load(ready.folder, transformers_tokenizer)
        wanted = Wanted(max_new_tokens=self.task.metric_tokens, chat_template=ready.chat_template)
        speaker = TextModel(ready.model, tokenizer, ready.folder, wanted)
        answers = []
        for number, question in enumerate(self.questions):
            answers.append(speaker.answer(question.asked, number).text)
            done(number + 1)
        try:
            found = self.function(answers, [question.wanted or "" for question in self.questions])
        except (Exception, SystemExit) as cause:  # the user's function may raise anything
            raise FailureError(
                f"task.metric: {self.task.metric} failed on {len(answers)} answers: {_of(cause)}"
            ) from cause
        name = str(self.task.metric).partition(":")[2]
        return {str(key): _number(value, self.task) for key, value in _figures(found, name).items()}

    def keep(self, run: Path, figures: Mapping[str, float]) -> None:
        """Write the figures over the answers to rows of test into the run's folder, where its page finds them."""
        content = {"rows": len(self.questions), "figures": dict(figures)}
        whole_file(run / OWN_METRIC, json.dumps(content).encode())


def own_metric(config: Config, part: Literal["dev", "test"] = "test") -> OwnMetric | None:
    """The metric that `task.metric` names, over rows of a part; None: it names none.

    The module is looked for where Python looks, and in the current folder.

    Raises:
        ConfigError: if there is no such module or function, or importing it fails.
        TaskError: if rows are of a format that has no answer.
    """
    task = config.task
    if not isinstance(task, SftConfig) or task.metric is None:
        return None
    module_name, _, name = task.metric.partition(":")
    before = list(sys.path)
    sys.path.insert(0, str(Path.cwd()))
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as cause:  # whatever the user's module does when it is imported
        raise ConfigError(
            f"task.metric: {task.metric}: {module_name} cannot be imported: {_of(cause)}; it is looked for in "
            f"{Path.cwd()} and on PYTHONPATH"
        ) from cause
    finally:
        sys.path[:] = before
    function = getattr(module, name, None)
    if not callable(function):
        raise ConfigError(
            f"task.metric: {task.metric}: {getattr(module, '__file__', None) or module_name} has no function "
            f"{name}; write one of two lists of texts, the answers and the references"
        )
    questions = held_out_questions(task, seed=config.seed, part=part)
    return OwnMetric(task, function, questions[: task.metric_rows])


def _figures(found: Any, name: str) -> Mapping[Any, Any]:
    return found if isinstance(found, Mapping) else {name: found}


def _number(value: Any, task: SftConfig) -> float:
    number = float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan
    if not math.isfinite(number):
        raise FailureError(
            f"task.metric: {task.metric} returned {value!r:.60}; it must be a number, or a mapping of names to numbers"
        )
    return number


def _of(cause: BaseException) -> str:
    """An exception of the user's code in one line."""
    return f"{type(cause).__name__}: {str(cause).partition(chr(10))[0]}"
