"""What an estimator or a law remembers of the call that made it: its text, and its problem."""

import functools
import inspect
import re
import textwrap
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple, ParamSpec, Protocol, TypeVar

import jax
import numpy as np

from unrollgrad._core import html
from unrollgrad.types import GradientEstimator, Numeric, UnrolledProblem

P = ParamSpec("P")
F = TypeVar("F", bound=Callable[..., Any])
_ARGUMENT = r"^    {}: (.*(?:\n {{6,}}.*)*)"


class About(NamedTuple):
    """The call that made an estimator.

    Attributes:
        text: The call, without the problem, such as ``pes(truncation=10, sigma=0.1)``.
        problem: The problem; None if it is not known.
        explain: Optional ``explain(history) -> text``: what the history of a run that ended with
            numbers that are not finite says about its settings. ``fit`` adds it to the error.
        settings: A law's call with its whole numbers and words alone, such as
            ``low_rank(rank=2)``: equal for calls that draw the same kind of noise, and without what
            may change while it is used, real numbers and arrays. Empty if it is not known.
    """

    text: str
    problem: UnrolledProblem | None = None
    explain: Callable[[dict[str, Any]], str] | None = None
    settings: str = ""

    def html(self, truncation: int | None) -> str:
        """A table for notebooks: the call, and how an episode is cut into calls."""
        rows: list[tuple[str, object]] = [("estimator", self.text)]
        horizon = None if self.problem is None else self.problem.horizon
        if callable(horizon):
            rows.append(("inner steps of an episode", "sampled"))
        elif horizon is not None:
            rows.append(("inner steps of an episode", horizon))
        if truncation is not None:
            rows.append(("inner steps of a call", truncation))
        elif self.problem is not None:
            rows.append(("inner steps of a call", "those of an episode"))
        return html.table(rows)


class _Begun(Protocol):
    """What a factory makes: a tuple of functions, with an ``init`` of its own."""

    @property
    def init(self) -> Callable[..., Any]: ...


Made = TypeVar("Made", bound=_Begun)


def about(made: _Begun) -> About:
    """The call that made the estimator or the law; one that a user wrote has no problem."""
    return getattr(made.init, "about", About(repr(made)))


def described(factory: Callable[P, Made]) -> Callable[P, Made]:
    """Makes a factory's estimators or laws remember its arguments: ``repr`` shows them.

    An estimator's first argument is the problem, or the estimators that it is made of.
    """

    @functools.wraps(factory)
    def make(*args: P.args, **kwargs: P.kwargs) -> Made:
        made = factory(*args, **kwargs)
        law = not isinstance(made, GradientEstimator)
        first: Any = None if law else next(iter((*args, *kwargs.values())), None)
        shown = [_text(x) for x in args if x is not first or not isinstance(x, UnrolledProblem)]
        shown += [f"{k}={_text(x)}" for k, x in kwargs.items() if law or x is not first]
        made.init.about = about(made)._replace(  # type: ignore[attr-defined]
            text=_call(factory, shown),
            problem=first if isinstance(first, UnrolledProblem) else _problem_of(first),
            settings=_call(factory, _settings(factory, args, kwargs)) if law else "",
        )
        return made

    return make


def _call(factory: Callable, shown: list[str]) -> str:
    return f"{getattr(factory, '__name__', 'estimator')}({', '.join(shown)})"


def settings_of(law: _Begun) -> str:
    """The law's call with the settings that fix the kind of its noise; its repr if a user wrote it.

    Estimators that carry noise or what it did to their states name it as their maker's setting.
    """
    own = about(law)
    return own.settings or own.text


def _settings(factory: Callable, args: tuple, kwargs: dict[str, Any]) -> list[str]:
    """The arguments that are whole numbers or words by their type, and not the default."""
    signature = inspect.signature(factory)
    given = signature.bind(*args, **kwargs).arguments
    kinds = {k: p for k, p in signature.parameters.items() if p.annotation not in (float, Numeric)}
    texts = {k: _fixed(x) for k, x in given.items() if k in kinds}
    return [f"{k}={x}" for k, x in texts.items() if x not in (None, _fixed(kinds[k].default))]


def _fixed(value: object) -> str | None:
    """One text for equal trees of whole numbers and words; None for other trees."""
    leaves = jax.tree_util.tree_leaves_with_path(value, is_leaf=lambda x: x is None)
    if not all(x is None or isinstance(x, str | int | np.integer) for _, x in leaves):
        return None
    texts = [
        (jax.tree_util.keystr(path), repr(int(x) if isinstance(x, np.integer) else x))
        for path, x in leaves
    ]
    if [path for path, _ in texts] == [""]:
        return texts[0][1]
    whole = ", ".join(f"{path}: {text}" for path, text in texts)
    if len(whole) > 100:  # errors show it
        whole = f"{whole[:80]}..., {len(texts)} leaves, checksum {zlib.crc32(whole.encode()):08x}"
    return "{" + whole + "}"


def explained_by(*others: Callable[..., Any]) -> Callable[[F], F]:
    """Completes the docstring of a function that shares arguments with others.

    Where it says ``x: As in ``soba``.``, ``help`` shows what the docstring of soba says of x. What
    follows the reference stays.
    """
    texts = {other.__name__: inspect.getdoc(other) or "" for other in others}

    def complete(function: F) -> F:
        text = inspect.getdoc(function) or ""
        for name, source in re.findall(r"^    (\w+): As in ``(\w+)``", text, re.M):
            found = re.search(_ARGUMENT.format(name), texts[source], re.M)
            if found is None:
                raise ValueError(f"`{source}` does not describe `{name}`, as {function} says.")
            told = found[1].removesuffix(".")
            own = re.search(_ARGUMENT.format(name), text, re.M)
            assert own is not None
            words = own[1].replace(f"As in ``{source}``", told, 1)
            line = f"    {name}: {' '.join(words.split())}"
            filled = textwrap.fill(line, 96, subsequent_indent=8 * " ", break_long_words=False)
            text = text.replace(own[0], filled, 1)
        function.__doc__ = text or None
        return function

    return complete


def _problem_of(first: Any) -> UnrolledProblem | None:
    if not isinstance(first, GradientEstimator):  # several estimators, or a loss
        first = next(iter(first), None) if isinstance(first, list | tuple) else None
    return about(first).problem if isinstance(first, GradientEstimator) else None


def _text(value: object) -> str:
    """A short text: arrays by dtype and shape, so that nothing is fetched; functions by name."""
    if isinstance(value, GradientEstimator):
        return repr(value)
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k!r}: {_text(x)}" for k, x in value.items()) + "}"
    if hasattr(value, "_fields"):  # a NamedTuple, such as a law of noise
        made = getattr(getattr(value, "init", None), "about", None)
        return type(value).__name__ if made is None else made.text
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_text, value))}]"
    if isinstance(value, jax.Array | np.ndarray):
        return f"{value.dtype}[{','.join(map(str, value.shape))}]"
    if callable(value):
        return getattr(value, "__name__", type(value).__name__)
    return repr(value)
