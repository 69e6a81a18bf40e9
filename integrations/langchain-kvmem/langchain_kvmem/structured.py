"""Structured output: answers that follow a schema, and their parsing."""

from __future__ import annotations

import json
from enum import Enum
from operator import itemgetter
from typing import Any

from langchain_core.exceptions import OutputParserException
from langchain_core.language_models import BaseChatModel, LanguageModelInput
from langchain_core.messages import BaseMessage
from langchain_core.output_parsers import JsonOutputParser, PydanticOutputParser
from langchain_core.runnables import Runnable, RunnableMap, RunnablePassthrough
from langchain_core.utils.function_calling import convert_to_json_schema
from langchain_core.utils.pydantic import is_basemodel_subclass

from kvmem import InputError


def structured(
    model: BaseChatModel, schema: dict[str, Any] | type, method: str, include_raw: bool
) -> Runnable[LanguageModelInput, Any]:
    """`model`, bound to a schema, and a parser of its answers. Raises InputError for a schema that is none."""
    json_schema = _as_json_schema(schema, method)
    internal = {"ls_structured_output_format": {"kwargs": {"method": method}, "schema": json_schema}}
    bound = model.bind(schema=json_schema, **internal)
    parser: Any = (
        PydanticOutputParser(pydantic_object=schema)
        if isinstance(schema, type) and is_basemodel_subclass(schema)
        else JsonOutputParser()
    )
    parser = RunnablePassthrough(_check_complete) | parser
    if not include_raw:
        plain: Runnable[LanguageModelInput, Any] = bound | parser
        return plain
    parsed = RunnablePassthrough.assign(parsed=itemgetter("raw") | parser, parsing_error=lambda _: None)
    failed = RunnablePassthrough.assign(parsed=lambda _: None)
    both: Runnable[LanguageModelInput, Any] = RunnableMap(raw=bound) | parsed.with_fallbacks(
        [failed], exception_key="parsing_error"
    )
    return both


def _as_json_schema(schema: dict[str, Any] | type, method: str) -> dict[str, Any]:
    if method not in ("json_schema", "function_calling", "json_mode"):
        raise InputError(f"method={method!r} is not known. Leave it out.")
    if isinstance(schema, type) and issubclass(schema, Enum):
        raise InputError(
            f"{schema.__name__} is an Enum, not an object. Use a pydantic model with a field of it, or the JSON "
            "schema {'enum': [...]}."
        )
    plain_schema = isinstance(schema, dict) and schema.get("type") not in (None, "function")
    # LangChain's conversion knows objects only, and drops the rest of any other schema.
    return dict(schema) if plain_schema else convert_to_json_schema(schema)  # type: ignore[arg-type]


def schema_of(response_format: Any) -> dict[str, Any] | None:
    """The JSON schema that OpenAI's `response_format` asks for. Raises InputError."""
    kind = response_format.get("type") if isinstance(response_format, dict) else None
    if kind == "text":
        return None
    if kind == "json_object":
        return {"type": "object"}
    if kind == "json_schema" and isinstance(response_format.get("json_schema"), dict):
        return dict(response_format["json_schema"].get("schema") or {"type": "object"})
    raise InputError(f"response_format={response_format!r} is not known. Give OpenAI's, or a schema.")


def _check_complete(message: BaseMessage) -> None:
    """LangChain's parsers close JSON that was cut off; an answer that lacks its end is an error."""
    try:
        json.loads(str(message.content))
    except ValueError as error:
        raise OutputParserException(
            f"The answer ends before its JSON does: {str(message.content)[-200:]!r}. Raise max_tokens.",
            llm_output=str(message.content),
        ) from error
