"""The markup by which model families mark thoughts and tool calls.

The formats are those of the families' chat templates and model cards; vLLM's tool parsers and Ollama's read the same.
All families are read by one reader: their marks differ, so that none of them has to be chosen.
"""

from __future__ import annotations

from typing import Any

import regex

# Where thoughts begin -> where they end. The first group only counts at the beginning of an answer, where a model
# begins to think; the others are special tokens, which nothing else writes.
THOUGHTS = {"<think>": "</think>", "<thought>": "</thought>", "<seed:think>": "</seed:think>"}
SPECIAL_THOUGHTS = {
    "<|START_THINKING|>": "<|END_THINKING|>",  # Command
    "[THINK]": "[/THINK]",  # Magistral
    "<|channel>thought\n": "<channel|>",  # Gemma 4
    "<|thought_start|>": "<|thought_end|>",  # MiniCPM3
}
# What stands before one call or several: JSON, a list of Python calls, XML, or a name with JSON.
CALLS = (
    "<tool_call>",  # Hermes, Qwen, GLM, Granite 4
    "<tool_calls>",  # Jamba
    "<tools>",  # Qwen2.5-Coder, now and then
    "<function_call>",
    "<|tool_call|>",  # Phi-4-mini, Granite 3
    "<|tool_call_start|>",  # LFM2, MiniCPM3
    "<|python_tag|>",  # Llama 3
    "[TOOL_CALLS]",  # Mistral
    "<|START_ACTION|>",  # Command R7B
    "<|action_start|><|plugin|>",  # InternLM
)
# What stands before the name of one call.
NAMED_CALLS = (
    "<function=",  # Llama 3, Qwen3-Coder
    '<invoke name="',  # MiniMax
    "<｜tool▁call▁begin｜>",  # DeepSeek
    "<|tool_call_begin|>",  # Kimi
    "<|tool_call>call:",  # Gemma 4
    "<start_function_call>call:",  # FunctionGemma
)
# What stands behind calls.
CLOSERS = (
    "</tool_call>",
    "</tool_calls>",
    "</tools>",
    "</function_call>",
    "</function>",
    "</invoke>",
    "</minimax:tool_call>",
    "<|/tool_call|>",
    "<|tool_call_end|>",
    "<｜tool▁call▁end｜>",
    "<｜tool▁calls▁end｜>",
    "<|tool_calls_section_end|>",
    "<tool_call|>",
    "<end_function_call>",
    "<|END_ACTION|>",
    "<|action_end|>",
)
# Special tokens that say nothing here.
NOISE = (
    "<minimax:tool_call>",
    "<｜tool▁calls▁begin｜>",
    "<|tool_calls_section_begin|>",
    "<|START_RESPONSE|>",
    "<|END_RESPONSE|>",
    "<|eom_id|>",
    "<|end|>",
    "<|call|>",
    "<|return|>",
)
_HARMONY = r"(?:<\|start\|>assistant)?(?:\s*to=(?P<to>[\w.\-]+))?\s*<\|channel\|>"

# What stands inside of calls.
_INSIDE = (
    *("[ARGS]", "[CALL_ID]", "<｜tool▁sep｜>", "<|tool_call_argument_begin|>", '<|"|>', "<escape>"),
    *("<|start|>", "<|channel|>", "<|message|>", "<|constrain|>"),
    *("<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"),
)
BRACKETED = tuple(mark for mark in (*CALLS, *SPECIAL_THOUGHTS) if mark.startswith("["))
_THOUGHTS = (*THOUGHTS, *THOUGHTS.values(), *SPECIAL_THOUGHTS, *SPECIAL_THOUGHTS.values())
_ALL = (*_THOUGHTS, *CALLS, *NAMED_CALLS, *CLOSERS, *NOISE, *_INSIDE)


def is_mark(token: str) -> bool:
    """Whether a special token is a part of this markup, so that decoding must keep it."""
    return any(token in mark for mark in _ALL)


def _any(literals: tuple[str, ...]) -> str:
    return "|".join(regex.escape(literal) for literal in sorted(literals, key=len, reverse=True))


_FENCE = r"```[ \t]*(?P<language>\w*)[ \t]*\n"
_BARE = r"(?m:^)[ \t]*(?=[\[{])"


def begun_at_end(text: str, literals: tuple[str, ...], least: int) -> str:
    """The end of a text that begins one of the marks with `least` characters or more; empty if there is none."""
    ends = (text[start:] for start in range(max(0, len(text) - max(map(len, literals)) + 1), len(text) - least + 1))
    return next((end for end in ends if any(literal.startswith(end) for literal in literals)), "")


def middle(*, tools: bool, harmony: bool) -> Any:
    """What may begin in the middle of an answer. harmony: whether the model is gpt-oss, which writes in channels."""
    groups = [rf"(?P<thought>{_any(tuple(SPECIAL_THOUGHTS))})"]
    if harmony:
        groups.append(rf"(?P<harmony>{_HARMONY})")
    if tools:
        groups += [rf"(?P<calls>{_any(CALLS)})", rf"(?P<named>{_any(NAMED_CALLS)})", rf"(?P<closer>{_any(CLOSERS)})"]
        groups += [rf"(?P<noise>{_any(NOISE)})", rf"(?P<fence>{_FENCE})", rf"(?P<bare>{_BARE})"]
    return regex.compile("|".join(groups))


# What may begin at the beginning of an answer, and behind thoughts.
BEGINNING = regex.compile(rf"\s*(?:(?P<thought>{_any((*THOUGHTS, *SPECIAL_THOUGHTS))})|(?P<bare>(?=[\[{{])))")
HARMONY_HEAD = regex.compile(r"<\|message\|>")
HARMONY_END = regex.compile(r"<\|end\|>|<\|return\|>|<\|call\|>|(?=<\|start\|>)")

# The name of a call, up to its arguments.
HEADS = tuple(
    map(
        regex.compile,
        (
            r"function<｜tool▁sep｜>(?P<name>[^\n`{]+?)\s*(?:```(?:json)?)?\s*",  # DeepSeek V3, R1
            r"(?P<name>[^<\n{]+?)<｜tool▁sep｜>\s*",  # DeepSeek V3.1
            r"(?:functions\.)?(?P<name>[^<:{\s]+?)(?::\d+)?\s*<\|tool_call_argument_begin\|>\s*",  # Kimi K2
            r"(?P<name>[\w.\-]+)\s*(?:\[CALL_ID\]\s*\w+\s*)?(?:\[ARGS\])?\s*",  # Mistral, Gemma, GLM
            r"(?P<name>[^>\s\"]+)\"?\s*>\s*",  # Llama, Qwen3-Coder, MiniMax
        ),
    )
)
# Where a name must have ended.
HEAD_END = regex.compile(r"(?=\{|<parameter|<arg_key>|</)")
PARAMETER = regex.compile(
    r"\s*(?:<parameter=(?P<key>[^>\n]+)>|<parameter name=\"(?P<key>[^\"]+)\">"
    r"|<arg_key>\s*(?P<key>[^<]*?)\s*</arg_key>\s*<arg_value>)"
)
PARAMETER_END = regex.compile(r"</parameter>|</arg_value>")
XML_END = regex.compile(r"\s*(?:</function>|</invoke>|</tool_call>)")
# Families whose arguments are not quite JSON, and where those end.
UNQUOTED = {
    "<|tool_call>call:": regex.compile(r"<tool_call\|>"),
    "<start_function_call>call:": regex.compile(r"<end_function_call>"),
}
CLOSER = regex.compile(rf"\s*(?:{_any(CLOSERS)})")
SPACE = regex.compile(r"\s*")
BETWEEN = regex.compile(r"[\s,;]*")
FENCE_END = regex.compile(r"\s*```[ \t]*(?=\n|$)")
PYTHON_FENCE = regex.compile(r"```(?:python|tool_code)?[ \t]*\n")
# A brace before the brace of an object, and the one that closes it.
DOUBLED = regex.compile(r"\{(?=\s*\{)")
BRACE = regex.compile(r"\s*\}")
BACKTICKS = regex.compile(r"\s*```")
PYTHONIC = regex.compile(r"\[\s*(?P<name>[A-Za-z_][\w.]*)\s*\(")
