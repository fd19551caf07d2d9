"""One expectation of a name, a signature or a behaviour, and the line that says what moved."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass

from .source_tree import SourceTree, called_names, constants, parameters


@dataclass(frozen=True)
class Expected:
    """Something that an adapter relies on.

    Attributes:
        path: ``module:name.attribute``; of several, separated by " or ", one is enough.
        why: what relies on it.
        takes: names of the parameters in their order, without ``self``; further ones must have a default.
        keywords: names that are taken by keyword.
        calls: names that are called within.
        says: constants that stand within; of those in a tuple, one is enough.
        required: False where the adapter looks whether it is there, and goes without.
    """

    path: str
    why: str
    takes: tuple[str, ...] = ()
    keywords: tuple[str, ...] = ()
    calls: tuple[str, ...] = ()
    says: tuple[object, ...] = ()
    required: bool = True

    def moved(self, tree: SourceTree) -> str | None:
        """What is not as expected, in one line; None where all is."""
        found = next(filter(None, map(tree.find, self.path.split(" or "))), None)
        if found is None:
            return f"{self.path} is gone: {self.why}" if self.required else None
        reasons = [*self._signature(found), *self._behaviour(found)]
        return f"{self.path} {', and '.join(reasons)}: {self.why}" if reasons else None

    def is_absent(self, tree: SourceTree) -> bool:
        """Whether it is not there, and need not be."""
        return not self.required and not any(map(tree.find, self.path.split(" or ")))

    def _signature(self, found: ast.AST) -> Iterator[str]:
        if not self.takes and not self.keywords:
            return
        if not isinstance(found, ast.FunctionDef | ast.AsyncFunctionDef):
            yield "is no function any more"
            return
        positional, keywords, with_default, any_keyword = parameters(found)
        if positional[:1] == ["self"] or positional[:1] == ["cls"]:
            positional = positional[1:]
        if self.takes:
            extra = [name for name in positional[len(self.takes) :] if name not in with_default]
            extra += [name for name in keywords if name not in with_default and name not in self.keywords]
            extra = [name for name in extra if name not in self.keywords]
            if tuple(positional[: len(self.takes)]) != self.takes:
                yield f"takes ({', '.join(positional)}), not ({', '.join(self.takes)})"
            elif extra:
                yield f"needs {', '.join(extra)} too"
        missing = [name for name in self.keywords if name not in (*positional, *keywords)]
        if missing and not any_keyword:
            yield f"takes no {', '.join(missing)}"

    def _behaviour(self, found: ast.AST) -> Iterator[str]:
        missing = [name for name in self.calls if name not in called_names(found)]
        if missing:
            yield f"does not call {', '.join(missing)}"
        unsaid = [one for one in map(_choices, self.says) if one.isdisjoint(constants(found))]
        if unsaid:
            yield f"does not mention {', '.join(' or '.join(sorted(map(repr, one))) for one in unsaid)}"


def _choices(said: object) -> set[object]:
    return set(said) if isinstance(said, tuple) else {said}
