"""Show the result of a run as a table."""

from __future__ import annotations

from typing import Any

from jaxtrain.monitor import Console, format_metrics


def show_summary(console: Console, name: str, folder: str, result: dict[str, Any]) -> None:
    """Show the result of run ``name`` as a table."""
    rows = {"test, last step": format_metrics(result["test"], None)}
    if "best" in result:
        best = result["best"]
        rows["best on valid"] = f"step {best['step']}, score {best['valid']:.4f}"
        rows["test, best step"] = format_metrics(best["test"], None)
    since = f" (from step {result['resumed_from']})" if result["resumed_from"] else ""
    rows |= {
        "steps": f"{result['steps']:,}",
        "wall time": f"{result['seconds']:.1f} s{since}",
        "speed": _speed_text(result) or "not measured",
        "folder": folder,
    }
    console.summary(name, rows)


def _speed_text(result: dict[str, Any]) -> str:
    """``1,234 examples/s, 56,789 tokens/s, MFU 41.2 % of 312 TFLOP/s (table)``, as far as it is known."""
    parts = [
        f"{result[f'{unit}_per_second']:,.0f} {unit}/s"
        for unit in ("examples", "tokens")
        if result.get(f"{unit}_per_second")
    ]
    if parts and result.get("mfu"):
        peak = f"{result['peak_flops'] / 1e12:.3g} TFLOP/s ({result['peak_by']})"
        parts.append(f"MFU {100 * result['mfu']:.1f} % of {peak}")
    return ", ".join(parts)
