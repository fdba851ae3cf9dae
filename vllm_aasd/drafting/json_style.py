"""How a model lays out JSON: the white space between its signs, learned from what it wrote.

Grammars leave white space free, so little of JSON is forced. A model has habits, though: once it has written ``": "``,
it will again.
"""

from collections import Counter

_WHITE = " \t\n\r"
_OPENING, _CLOSING = "{[", "}]"
_LONGEST_GAP = 16
# A model's habit counts once this share of at least `_FEWEST` gaps follows it.
_USUAL_SHARE, _FEWEST = 0.7, 2
# Counts are halved when they reach this, so that a habit can change.
_MOST = 64

Gap = tuple[str, bool]
"""White space without its indentation, and whether it is indented by the depth."""


class JSONStyle:
    """The white space at each kind of place: of one answer, and of a model.

    Args:
        usual: of the model; None if this is one.
    """

    def __init__(self, usual: "JSONStyle | None" = None) -> None:
        self._usual = usual
        self._latest: dict[str, Gap] = {}
        self._counts: dict[str, Counter[Gap]] = {}
        self._unit = ""

    def learn(self, place: str, gap: str, depth: int) -> None:
        """Note the white space at a place; see `JSONReader.place`.

        Args:
            place: its kind.
            gap: what stands there.
            depth: how many objects and arrays it is within.
        """
        if len(gap) > _LONGEST_GAP + depth * 8:
            return
        indent = gap.rpartition("\n")[2]
        is_indented = "\n" in gap and len(indent) % max(depth, 1) == 0 and bool(depth) == bool(indent)
        if is_indented and depth:
            self._unit = indent[: len(indent) // depth]
        found = (gap[: len(gap) - len(indent)], True) if is_indented else (gap, False)
        self._latest[place] = found
        counts = self._counts.setdefault(place, Counter())
        counts[found] += 1
        if counts.total() > _MOST:
            self._counts[place] = Counter({of: count // 2 for of, count in counts.items() if count > 1})
        if self._usual is not None:
            self._usual.learn(place, gap, depth)

    def expected(self, place: str, depth: int) -> str | None:
        """The white space to expect at a place, as for `learn`; None if there is no habit."""
        found = self._latest.get(place)
        if self._usual is None:
            counts = self._counts.get(place, Counter())
            found, count = counts.most_common(1)[0] if counts else (None, 0)
            if count < max(_FEWEST, _USUAL_SHARE * counts.total()):
                found = None
        if found is not None:
            return found[0] + self._unit * depth if found[1] else found[0]
        return self._usual.expected(place, depth) if self._usual is not None else None


class JSONReader:
    """Where in JSON a text has come to; other text only makes it expect the wrong white space.

    Args:
        style: of its writer, which learns from what is read.

    Attributes:
        in_string: whether it ends within a string.
        last: its last sign that isn't white space; a quotation mark after a string; empty at the beginning.
        string_length: characters of the string that it ends within.
    """

    __slots__ = ("_gap", "_is_escaped", "_learns", "_open", "_style", "in_string", "last", "string_length")

    def __init__(self, style: JSONStyle) -> None:
        self._style = style
        self._learns = True
        self._open = ""
        self._is_escaped = False
        self._gap = ""
        self.in_string = False
        self.last = ""
        self.string_length = 0

    @property
    def depth(self) -> int:
        """How many objects and arrays it ends within."""
        return len(self._open)

    def ahead(self) -> "JSONReader":
        """A copy, to read what may not come: nothing is learned from it."""
        copy = JSONReader(self._style)
        copy._learns = False
        copy._open, copy._is_escaped, copy._gap = self._open, self._is_escaped, self._gap
        copy.in_string, copy.last, copy.string_length = self.in_string, self.last, self.string_length
        return copy

    def gap_before(self, following: str) -> str | None:
        """The white space to expect before a sign, less what stands there already; None if there is no habit."""
        place, depth = self.place(following)
        expected = self._style.expected(place, depth) if place else ""
        if expected is None or not self._gap:
            return expected
        return expected[len(self._gap) :] if expected.startswith(self._gap) else ""

    def place(self, following: str) -> tuple[str, int]:
        """The kind of place before a sign, empty where no white space is expected, and its depth.

        Args:
            following: the sign.
        """
        if following in _CLOSING:
            return ("" if self.last in _OPENING else following), max(len(self._open) - 1, 0)
        if self.last == ",":
            return "," + self._open[-1:], len(self._open)
        return (self.last if self.last in (":", "{", "[") else ""), len(self._open)

    def read(self, text: str) -> None:
        """Go on to the end of more text."""
        for sign in text:
            if self.in_string:
                # A raw line break can't be in a string, so this isn't one.
                if sign == "\n" or (sign == '"' and not self._is_escaped):
                    self.in_string, self.last, self._gap = False, '"', ""
                self._is_escaped = sign == "\\" and not self._is_escaped
                self.string_length += 1
            elif sign in _WHITE:
                self._gap += sign
            else:
                self._sign(sign)

    def _sign(self, sign: str) -> None:
        place, depth = self.place(sign)
        if place and self._learns:
            self._style.learn(place, self._gap, depth)
        if sign in _OPENING:
            self._open += sign
        elif sign in _CLOSING:
            self._open = self._open[:-1]
        self.in_string, self._is_escaped = sign == '"', False
        self.last, self._gap, self.string_length = sign, "", 0
