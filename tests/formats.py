"""How model families write tool calls, and what is read of them. Run as a script to update docs/tools.md."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvmem.parsing import AnswerReader, ReadAnswer
from kvmem.parsing.tools import ToolIndex

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
            "required": ["city"],
        },
    },
}
NOW = {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}}
TOOLS = ToolIndex.of([WEATHER, NOW])
PARIS = {"city": "Paris", "days": 2}
DOCS = Path(__file__).parents[1] / "docs" / "tools.md"


@dataclass(frozen=True)
class Family:
    """How a family writes.

    call: writes one call. around: what stands before all calls, and behind them. cut: characters at the end of a call
        without which its arguments are not complete. broken: writes a call whose arguments are not valid. opening: the
        end of its prompts. thought: what stands before and behind thoughts.
    """

    call: Callable[[str, dict[str, Any]], str]
    broken: str
    end: str = ""
    around: tuple[str, str] = ("", "")
    opening: str = ""
    thought: tuple[str, str] = ("<think>\n", "\n</think>\n\n")
    text: Callable[[str], str] = str
    # Without a mark, a call of a tool that does not exist is text.
    marked: bool = True


def _json(name: str, arguments: dict[str, Any], key: str = "arguments") -> str:
    return json.dumps({"name": name, key: arguments})


def _xml(name: str, arguments: dict[str, Any]) -> str:
    inner = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in arguments.items())
    return f"<tool_call>\n<function={name}>\n{inner}</function>\n</tool_call>"


def _glm(name: str, arguments: dict[str, Any]) -> str:
    pairs = (f"<arg_key>{key}</arg_key>\n<arg_value>{value}</arg_value>\n" for key, value in arguments.items())
    return f"<tool_call>{name}\n{''.join(pairs)}</tool_call>"


def _minimax(name: str, arguments: dict[str, Any]) -> str:
    inner = "".join(f'<parameter name="{key}">{value}</parameter>\n' for key, value in arguments.items())
    return f'<minimax:tool_call>\n<invoke name="{name}">\n{inner}</invoke>\n</minimax:tool_call>'


def _gemma(name: str, arguments: dict[str, Any], mark: str, begin: str, end: str) -> str:
    values = (f"{key}:{mark}{v}{mark}" if isinstance(v, str) else f"{key}:{v}" for key, v in arguments.items())
    return f"{begin}call:{name}{{{','.join(values)}}}{end}"


def _python(name: str, arguments: dict[str, Any]) -> str:
    return f"{name}({', '.join(f'{key}={value!r}' for key, value in arguments.items())})"


def _harmony(name: str, arguments: dict[str, Any]) -> str:
    head = f"<|start|>assistant<|channel|>commentary to=functions.{name} <|constrain|>json<|message|>"
    return f"{head}{json.dumps(arguments)}<|call|>"


_BROKEN = '{"name": "weather", "arguments": {"city": }}'
_BROKEN_ARGUMENTS = '{"city": }'
_HARMONY_BROKEN = "<|start|>assistant<|channel|>commentary to=functions.weather<|message|>" + _BROKEN_ARGUMENTS
FAMILIES: dict[str, Family] = {
    "Hermes, Qwen2.5, Qwen3": Family(
        lambda n, a: f"<tool_call>\n{_json(n, a)}\n</tool_call>",
        f"<tool_call>\n{_BROKEN}\n</tool_call>",
        "}\n</tool_call>",
    ),
    "Qwen2.5-Coder (code block)": Family(
        lambda n, a: f"```json\n{_json(n, a)}\n```", f"```json\n{_BROKEN}\n```", "}\n```", marked=False
    ),
    "Llama 3 (bare JSON)": Family(lambda n, a: _json(n, a, "parameters"), _BROKEN, "}", marked=False),
    "Llama 3 (<|python_tag|>)": Family(
        lambda n, a: f"<|python_tag|>{_json(n, a, 'parameters')}", f"<|python_tag|>{_BROKEN}", "}"
    ),
    "Llama 3 (<function=...>)": Family(
        lambda n, a: f"<function={n}>{json.dumps(a)}</function>",
        f"<function=weather>{_BROKEN_ARGUMENTS}</function>",
        "}</function>",
    ),
    "Qwen3-Coder, Qwen3.5": Family(
        _xml, "<tool_call>\n<function=weather>\ncity is Paris\n</function>\n</tool_call>", "</function>\n</tool_call>"
    ),
    "Mistral": Family(
        lambda n, a: f"[TOOL_CALLS][{_json(n, a)}]", f"[TOOL_CALLS][{_BROKEN}]", "}]", thought=("[THINK]", "[/THINK]")
    ),
    "Mistral Small 3.2, Magistral": Family(
        lambda n, a: f"[TOOL_CALLS]{n}[ARGS]{json.dumps(a)}",
        f"[TOOL_CALLS]weather[ARGS]{_BROKEN_ARGUMENTS}",
        "}",
        thought=("[THINK]", "[/THINK]"),
    ),
    "DeepSeek V3, R1": Family(
        lambda n, a: (
            f"<｜tool▁call▁begin｜>function<｜tool▁sep｜>{n}\n```json\n{json.dumps(a)}\n```<｜tool▁call▁end｜>"
        ),
        f"<｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n{_BROKEN_ARGUMENTS}\n```<｜tool▁call▁end｜>",
        "}\n```<｜tool▁call▁end｜>",
        around=("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"),
    ),
    "DeepSeek V3.1": Family(
        lambda n, a: f"<｜tool▁call▁begin｜>{n}<｜tool▁sep｜>{json.dumps(a)}<｜tool▁call▁end｜>",
        f"<｜tool▁call▁begin｜>weather<｜tool▁sep｜>{_BROKEN_ARGUMENTS}<｜tool▁call▁end｜>",
        "}<｜tool▁call▁end｜>",
        around=("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"),
    ),
    "Kimi K2": Family(
        lambda n, a: f"<|tool_call_begin|>functions.{n}:0<|tool_call_argument_begin|>{json.dumps(a)}<|tool_call_end|>",
        f"<|tool_call_begin|>functions.weather:0<|tool_call_argument_begin|>{_BROKEN_ARGUMENTS}<|tool_call_end|>",
        "}<|tool_call_end|>",
        around=("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"),
    ),
    "GLM 4.5": Family(_glm, "<tool_call>weather\nParis</tool_call>", "</tool_call>"),
    "MiniMax M2": Family(_minimax, '<invoke name="weather">\nParis\n</invoke>', "</invoke>\n</minimax:tool_call>"),
    "Gemma 3 (tool_code)": Family(
        lambda n, a: f"```tool_code\nprint({_python(n, a)})\n```",
        "```tool_code\nweather(city=)\n```",
        ")\n```",
        marked=False,
    ),
    "FunctionGemma": Family(
        lambda n, a: _gemma(n, a, "<escape>", "<start_function_call>", "<end_function_call>"),
        "<start_function_call>call:weather{city}<end_function_call>",
        "}<end_function_call>",
    ),
    "Gemma 4": Family(
        lambda n, a: _gemma(n, a, '<|"|>', "<|tool_call>", "<tool_call|>"),
        "<|tool_call>call:weather{city}<tool_call|>",
        "}<tool_call|>",
        thought=("<|channel>thought\n", "<channel|>"),
    ),
    "Phi-4-mini, Granite 3": Family(
        lambda n, a: f"<|tool_call|>[{_json(n, a)}]<|/tool_call|>",
        f"<|tool_call|>[{_BROKEN}]<|/tool_call|>",
        "}]<|/tool_call|>",
    ),
    "Command R7B": Family(
        lambda n, a: (
            f"<|START_ACTION|>[{json.dumps({'tool_call_id': '0', 'tool_name': n, 'parameters': a})}]<|END_ACTION|>"
        ),
        '<|START_ACTION|>[{"tool_name": "weather", "parameters": {"city": }}]<|END_ACTION|>',
        "}]<|END_ACTION|>",
        thought=("<|START_THINKING|>", "<|END_THINKING|>"),
        text=lambda text: f"<|START_RESPONSE|>{text}<|END_RESPONSE|>",
    ),
    "LFM2": Family(
        lambda n, a: f"<|tool_call_start|>[{_python(n, a)}]<|tool_call_end|>",
        "<|tool_call_start|>[weather(city=)]<|tool_call_end|>",
        ")]<|tool_call_end|>",
    ),
    "gpt-oss": Family(
        _harmony,
        _HARMONY_BROKEN,
        "}<|call|>",
        opening="<|start|>assistant",
        thought=("<|channel|>analysis<|message|>", "<|end|>"),
        text=lambda text: f"<|start|>assistant<|channel|>final<|message|>{text}<|return|>",
    ),
}
SAID = "Let me see."


def cases(family: Family) -> dict[str, str]:
    """An answer of each kind."""
    call, (before, behind), thought = family.call, family.around, family.thought
    one = f"{before}{call('weather', PARIS)}{behind}"
    whole = call("weather", PARIS)
    return {
        "one call": one,
        "several": f"{before}{call('weather', PARIS)}\n{call('now', {})}{behind}",
        "no call": family.text(SAID),
        "text before": f"{family.text(SAID)}\n{one}",
        "in thoughts": f"{thought[0]}I could write {_inside(family, one)}.{thought[1]}{family.text(SAID)}",
        "cut off": before + whole[: whole.rindex(family.end)],
        "not JSON": f"{before}{family.broken}{behind}",
        "unknown tool": f"{before}{call('dance', PARIS)}{behind}",
    }


def _inside(family: Family, text: str) -> str:
    """Thoughts of gpt-oss hold no messages; its calls stand in messages of their own."""
    return "a call" if family.opening else text


def read(family: Family, text: str) -> ReadAnswer:
    reader = AnswerReader(TOOLS, family.opening)
    reader.feed(text)
    return reader.finish()


def summary(answer: ReadAnswer) -> str:
    """What came out, in words."""
    found = [f"call `{call.name}`" for call in answer.tool_calls]
    found += ["invalid call" for _ in answer.invalid_calls]
    found += ["thoughts"] if answer.reasoning else []
    return " + ".join(([] if not answer.text else ["text"]) + found)


def table() -> str:
    """What is read of each case, as Markdown."""
    names = list(cases(next(iter(FAMILIES.values()))))
    lines = ["| Family | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for name, family in FAMILIES.items():
        found = [summary(read(family, text)) for text in cases(family).values()]
        shown = name.replace("|", "\\|").replace("<", "&lt;")
        lines.append(f"| {shown} | " + " | ".join(found) + " |")
    return "\n".join(lines)


BEGIN, END = "<!-- formats: begin -->", "<!-- formats: end -->"


def with_table(page: str) -> str:
    """A page with a new table."""
    before, _, rest = page.partition(BEGIN)
    return f"{before}{BEGIN}\n\n{table()}\n\n{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    DOCS.write_text(with_table(DOCS.read_text()))
