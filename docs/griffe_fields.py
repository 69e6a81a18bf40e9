"""Shows the fields and arguments of a docstring, one a line in the code, as a list in the API reference."""

from __future__ import annotations

import re
from typing import Any

import griffe

_FIELD = re.compile(r"^ {0,4}((?:`?\w+`?(?:, )?)+): (?=\S)", re.M)


class Fields(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            head, gap, rest = obj.docstring.value.partition("\n")
            listed = _FIELD.sub(r"\n- **\1**: ", rest)
            obj.docstring.value = head + gap + re.sub(r"^(?=Raises )", "\n", listed, flags=re.M)
