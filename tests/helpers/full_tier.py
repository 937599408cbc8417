"""Pytest plug-in of the full tier: skips what has passed on the present sources and writes tests/results.md.

A test reports the figures it measured with pytest's `record_property(name, value)`.
"""

import hashlib
import json
import os
import platform
import subprocess
from collections import defaultdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "tests" / "results.md"


def hash_sources() -> str:
    """Digest of all code a result depends on."""
    digest = hashlib.sha256()
    for folder in ("megatron_metro", "tools", "tests"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def describe_commit() -> str:
    """Short commit id, and whether the sources differ from it."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()

    commit = git("rev-parse", "--short", "HEAD") or "unknown"
    changes = git("status", "--porcelain", "--", "megatron_metro", "tools", "tests", ":!tests/results.md")
    return f"{commit}, with uncommitted changes" if changes else commit


def describe_cpu() -> str:
    """Model name of the processor."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def read_records(path: Path) -> dict[str, dict[str, Any]]:
    """The last record of each test; a line cut short by an interruption is the last one and is dropped."""
    records: dict[str, dict[str, Any]] = {}
    if path.exists():
        for line in path.read_text().splitlines(keepends=True):
            if line.endswith("\n"):
                record = json.loads(line)
                records[record["test"]] = record
    return records


def format_results(records: dict[str, dict[str, Any]], num_collected: int) -> str:
    """The Markdown page: one row per test function, its parametrisations counted together."""
    functions: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for record in records.values():
        functions[record["test"].partition("[")[0]].append(record)
    num_passed = sum(r["outcome"] == "passed" for r in records.values())
    now = datetime.now(timezone.utc)
    lines = [
        "# Results of the full tier",
        "",
        f"Written by `bash tests/full.sh` on {now:%Y-%m-%d %H:%M} UTC at commit {describe_commit()}; "
        f"{os.cpu_count()} cores of {describe_cpu()}, torch {torch.__version__}.",
        "",
        f"{num_collected} tests: {num_passed} passed, {len(records) - num_passed} failed, "
        f"{num_collected - len(records)} not run yet.",
        "",
        "| test | passed | seconds | figures |",
        "|---|---|---|---|",
    ]
    for name, rows in sorted(functions.items()):
        passed = sum(r["outcome"] == "passed" for r in rows)
        figures = "; ".join(f"{k} {v}" for r in rows for k, v in r["figures"])
        lines.append(f"| {name} | {passed} of {len(rows)} | {sum(r['seconds'] for r in rows):.0f} | {figures} |")
    return "\n".join(lines) + "\n"


class FullTier:
    """Hooks of one session."""

    def __init__(self, records_path: Path) -> None:
        self.records_path = records_path
        self.records = read_records(records_path)
        self.num_collected = 0

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        self.num_collected = len(items)
        done = [i for i in items if self.records.get(i.nodeid, {}).get("outcome") == "passed"]
        if done:
            config.hook.pytest_deselected(items=done)
            items[:] = [i for i in items if i not in done]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.passed:
            return
        record = {
            "test": report.nodeid,
            "outcome": report.outcome,
            "seconds": round(report.duration, 2),
            "figures": report.user_properties,
        }
        self.records[report.nodeid] = record
        with self.records_path.open("a") as file:
            file.write(json.dumps(record) + "\n")
        RESULTS.write_text(format_results(self.records, self.num_collected))

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        if exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED and self.num_collected:
            session.exitstatus = pytest.ExitCode.OK  # everything had passed before


def pytest_configure(config: pytest.Config) -> None:
    """Start recording, in a file that belongs to the present sources."""
    folder = ROOT / "runs" / "full"
    folder.mkdir(parents=True, exist_ok=True)
    config.pluginmanager.register(FullTier(folder / f"{hash_sources()}.jsonl"))
