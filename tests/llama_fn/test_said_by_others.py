"""What processes that are not the first say: their own matters, not what the first says as well."""

import logging
from pathlib import Path

import pytest

import llama_fn
from llama_fn.run import runtime


@pytest.fixture
def root():
    root = logging.getLogger("llama_fn")
    before = root.handlers[:], root.level, root.propagate
    yield root
    root.handlers[:], root.propagate = before[0], before[2]
    root.setLevel(before[1])


@pytest.mark.parametrize("quiet, said", [(False, "step lint machine lost"), (True, "machine lost")])
def test_other_processes_leave_to_the_first_what_all_would_warn_of(root, capsys, quiet, said):
    runtime.log_to_terminal(None, quiet)
    logging.getLogger("llama_fn.compiling").info("step")
    logging.getLogger("llama_fn.lints").warning("lint")
    logging.getLogger("llama_fn.machine_checks").warning("machine")
    logging.getLogger("llama_fn.loop").error("lost")
    assert capsys.readouterr().err.split() == said.split()


def test_every_logger_that_is_left_to_the_first_exists():
    sources = "".join(path.read_text() for path in Path(llama_fn.__file__).parent.rglob("*.py"))
    assert all(f'getLogger("{name}")' in sources for name in runtime._ALIKE)
