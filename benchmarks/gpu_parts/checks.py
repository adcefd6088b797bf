"""Part 1: the tests marked `gpu`, each an item."""

import os
from pathlib import Path

import pytest

from gpu_parts.part import Part
from ldm3d.environment import describe_environment

TESTS = Path(__file__).parents[2] / "tests"
DRY = "LDM3D_GPU_DRY"  # an environment variable: run what a CPU can, too


class Recorder:
    """A plugin of pytest that keeps outcomes and recorded figures, and leaves out what is done or too late."""

    def __init__(self, part: Part):
        self.part = part

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        done = self.part.items.keys() | self.part.state["failed"].keys()
        config.hook.pytest_deselected(items=[item for item in items if item.name in done])
        items[:] = [item for item in items if item.name not in done]

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        if self.part.seconds_left <= 0:
            self.part.leave_out(item.name, "the time was over")
            pytest.skip("the time is over")
        self.part.state["running"] = item.name
        self.part.write()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        name = report.nodeid.partition("::")[2]
        if report.failed:
            self.part.fail(name, report.longreprtext)
        elif name in self.part.state["left_out"]:
            return
        elif report.skipped:
            self.part.add(name, {"outcome": "skipped", "reason": report.longrepr[2]})
        elif report.when == "call":
            self.part.add(name, {"outcome": "passed", **dict(report.user_properties), "seconds": round(report.duration, 2)})


def work(part: Part, work: Path, data: Path | None) -> None:
    """Run them; what a CPU can where the part is dry."""
    part.do("environment", lambda: {"text": describe_environment().splitlines()})
    if part.dry:
        os.environ[DRY] = "1"
    options = ["-p", "no:cacheprovider", "-p", "no:xdist", "--basetemp", str(work / "tests"), "-m", "gpu"]
    work.mkdir(parents=True, exist_ok=True)
    code = pytest.main([str(TESTS / "test_gpu.py"), "-q", *options], plugins=[Recorder(part)])
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.NO_TESTS_COLLECTED):
        part.fail("pytest", f"ended with {code!r}; its output says why")
