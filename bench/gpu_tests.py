"""Plugin of pytest for the tests on a GPU: ``-p bench.gpu_tests``.

Says at once why a test failed, for a run that is cut off has no summary; and ends a process whose GPU takes
no more work, as after an illegal access, where pytest-xdist starts another in its place: all tests that the
same process ran later would fail too.
"""

from __future__ import annotations

import os

import pytest
import torch

LINES = 30  # of what a failed test says


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """In the process that gathers the reports of all."""
    if report.failed and "PYTEST_XDIST_WORKER" not in os.environ:
        lines = report.longreprtext.splitlines()[-LINES:]
        print("", f"----- {report.nodeid}", *lines, sep="\n", flush=True)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo):
    """In the process of the test."""
    report = yield
    if report.failed and "PYTEST_XDIST_WORKER" in os.environ and not _gpu_works():
        print(report.longreprtext, flush=True)
        os._exit(1)
    return report


def _gpu_works() -> bool:
    if not torch.cuda.is_initialized():
        return True
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True
