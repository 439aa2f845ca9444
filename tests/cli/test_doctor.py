"""`foveal doctor`: the facts, as text and as JSON."""

import json
from pathlib import Path
from typing import Any

import foveal
from foveal import kernels
from foveal.cli import doctor


def test_json_says_which_version_each_operation_runs(run: Any) -> None:
    """Guards against an operation that is missing, or said to run a version that it does not have."""
    report = json.loads(run("doctor", "--json").out)
    assert report["versions"]["foveal"] == foveal.__version__
    assert set(report["operations"]) == {operation.name for operation in kernels.operations()}
    for facts in report["operations"].values():
        assert facts["runs"] in facts["versions"]


def test_text_has_every_fact(run: Any) -> None:
    """Guards against facts that only the JSON has."""
    text = run("doctor").out
    report = json.loads(run("doctor", "--json").out)
    for title, facts in report.items():
        assert title in text
        assert all(name in text for name in facts)


def test_reads_the_features_of_a_processor(tmp_path: Path) -> None:
    """Guards the parsing of /proc/cpuinfo: whole flags (avx512f is not avx512_bf16), of the first core."""
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(
        "processor\t: 0\nmodel name\t: Fast CPU\nflags\t\t: fpu avx2 avx512_bf16\n\nmodel name\t: Other\n"
    )
    facts = doctor._processor(cpuinfo)
    assert facts["model"] == "Fast CPU"
    assert facts["features"] == ["avx2", "avx512_bf16"]


def test_does_without_cpuinfo(tmp_path: Path) -> None:
    """Guards against a crash on systems other than Linux."""
    assert doctor._processor(tmp_path / "none")["features"] == []
