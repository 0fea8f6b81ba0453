# Needs git, make and Python 3.11 or newer; everything else is installed into .venv.
#   make run    train the natural and the free model on embedded images, attack both, draw both
#   make test   all tests       make lint   style and types       make clean   remove build outputs
#   make peers  exports in RobustBench's own environment, which it builds
# ARGS="..." is handed on, for example: make test ARGS="-k free"

PYTHON ?= python3
TEST_WORKERS ?= 2
ARGS ?=

.PHONY: run test peers lint clean venv

run: venv
	.venv/bin/python launch/quickstart.py $(ARGS)

# On a busy machine spinning OpenMP threads stall each other to a tenth of their speed.
export OMP_WAIT_POLICY = passive

# Every test runs on one thread, so that workers do not fight for the cores.
test: export OMP_NUM_THREADS = 1
# They start some hundred processes, none of which should compile our modules again.
test: venv
	env -u PYTHONDONTWRITEBYTECODE .venv/bin/python -m pytest -q -n $(TEST_WORKERS) $(ARGS)

# Exports in the environments of those who load them; they are built in .cache/peers/.
peers: venv
	.venv/bin/python -m pytest -q -m peers $(ARGS)

lint: venv
	.venv/bin/python -m ruff check .
	.venv/bin/python -m ruff format --check .
	.venv/bin/python -m mypy
	@if command -v clang-format >/dev/null; then clang-format --dry-run -Werror csrc/*; fi

venv:
	@$(PYTHON) .ci/make_venv.py

# The environment stays, but the next make builds the extension again.
clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache freeadv_fast/*.so
	rm -f .venv/freeadv_fast.stamp
