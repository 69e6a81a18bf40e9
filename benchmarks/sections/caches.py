"""Sections on the store, the library, batches, conversations and the server."""

from __future__ import annotations

from typing import Any

from benchmarks.sections.markdown import spread, table


def store(result: dict[str, Any]) -> list[str]:
    loading = [(r["way"], f"{r['ratio_to_copy']:.2f}") for r in result["loading"]]
    native = result["packing"][0]["bytes"]
    packing = [
        (r["kv_dtype"], f"{r['bytes'] / native:.2f}", *(f"{r[k]:.5f}" for k in ("kl_mean", "kl_median", "kl_p90")))
        for r in result["packing"]
    ]
    settings = result["settings"]
    return [
        f"## Store: {result['model']}",
        "",
        "Loading an entry of 100 MB from the page cache into a buffer: the time of a plain copy divided by the time of the",
        "load (1 is as fast as copying), by `verify` and `kv_dtype`:",
        "",
        *table(("", "copy ÷ load"), loading),
        "",
        f"What packing costs: KL of the next token to full prefill, for {settings['questions']} prompts of "
        f"{settings['passages']} passages where every entry is an exact hit. Native is not 0, because bfloat16 rounds "
        "differently when a prompt is prefilled in pieces.",
        "",
        *table(("kv_dtype", "bytes ÷ native", "KL mean", "median", "p90"), packing),
    ]


def library(result: dict[str, Any]) -> list[str]:
    settings = result["settings"]
    rows = [
        (name, *(f"{1000 * row['seconds'][name]:.1f} ms" for row in result["rows"]), f"{exponent:.2f}")
        for name, exponent in result["exponents"].items()
    ]
    return [
        "## Many documents",
        "",
        f"One namespace of short documents beside {settings['others']:,} records of others, on disk. Medians of "
        f"{settings['samples']} calls, without the time that the model computes. The exponent is the slope of log(time) "
        "over log(documents): 0 is independent of the number of documents, 1 is linear. The namespace has "
        f"{settings['samples']} memories at every size, so Memory.forget does not show how forgetting grows with memories.",
        "",
        *table(("", *(f"{row['documents']:,}" for row in result["rows"]), "exponent"), rows),
    ]


def batch(result: dict[str, Any]) -> list[str]:
    settings = result["settings"]
    rows = []
    for fixed, name in ((True, "32 tokens each"), (False, "up to 32 tokens")):
        found = sorted((row for row in result["rows"] if row["fixed"] == fixed), key=lambda row: row["speedup"])
        equal = ", ".join(str(row["equal"]) for row in found)
        rows.append((name, spread([row["speedup"] for row in found]), f"{equal} of {settings['batch']}"))
    return [
        f"## Batch: {result['model']}",
        "",
        f"{settings['batch']} questions over one corpus with {result['rows'][0]['prompt_tokens']} prompt tokens; all "
        "entries are in memory and exact. The ratio is tokens per second as a batch divided by tokens per second one by "
        f"one (median and range of {settings['repeats']} runs). Greedy answers differ where bfloat16 rounds a near tie "
        "differently; in float32 they are equal, which a test checks.",
        "",
        *table(("answers", "batch ÷ one by one", "equal answers"), rows),
    ]


def conversation(result: dict[str, Any]) -> list[str]:
    rows = result["rows"]
    shown = [row for row in rows if row["turn"] in (1, 2, 5, 10, 11, 15, len(rows))]
    return [
        f"## Conversation: {result['model']}",
        "",
        f"{len(rows)} turns. Every turn uses two of eight passages and two of six memories, chosen at random, and the engine "
        f"is closed and reopened before turn {result['restart_before_turn']}. Computed is the model's work before the first "
        "token, in tokens through all layers, including blending. Full prefill computes the whole prompt.",
        "",
        *table(
            ("turn", "prompt tokens", "computed", "first token ÷ full prefill"),
            [(str(r["turn"]), str(r["prompt_tokens"]), f"{r['work']:.0f}", f"{r['ratio']:.2f}") for r in shown],
        ),
    ]


def serve(result: dict[str, Any]) -> list[str]:
    settings, crowd, left, full = result["settings"], result["crowd"], result["leaving"], result["full"]
    agent = [
        (str(row["turn"]), str(row["prompt"]), f"{row['reused'] / row['prompt']:.2f}", str(row["usage"]["recomputed"]))
        for row in result["agent"]
    ]
    grown = crowd["memory_at_the_end"] / crowd["memory_after_a_third"] - 1
    found = [
        ("answers, errors", f"{crowd['answers']}, {crowd['errors']}"),
        ("answers per client, fewest and most", f"{crowd['fewest']}, {crowd['most']}"),
        ("growth of the server's memory, from the end of the first third to the end", f"{grown:+.1%}"),
        (
            f"{left['clients']} clients that disconnected early: server idle after at most",
            f"{left['free_highest']:.2f} s",
        ),
        (f"{full['requests']} concurrent requests with a queue of {settings['queue']}: refused", str(full["refused"])),
        ("refused after at most", f"{full['refused_after_highest']:.2f} s"),
    ]
    return [
        f"## kvmem serve: {result['model']}",
        "",
        "A coding agent sends five files of this package and the conversation so far in every turn; one line of one file "
        "is edited between turns. The share reused is the share of exact and reused tokens:",
        "",
        *table(("turn", "prompt", "share reused", "recomputed"), agent),
        "",
        f"{settings['clients']} clients in another process ask and read streamed answers for {settings['seconds']:.0f} s:",
        "",
        *table(("", "result"), found),
    ]
