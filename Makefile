# The project's tasks. `make` lists them.
.PHONY: help test slow lint types docs wheel page quickstart all
help:  ## list the tasks
	@sed -n 's/^\([a-z]*\):.*## /  \1\t/p' $(MAKEFILE_LIST)
test:  ## the tests, in under 15 minutes on 2 cores
	bash tests/run.sh
slow:  ## the slow tests
	bash tests/run.sh -m slow
lint:  ## ruff, and its formatter
	bash examples/setup_env.sh && .venv/bin/ruff check . && .venv/bin/ruff format --check .
types:  ## mypy
	bash examples/setup_env.sh && .venv/bin/mypy
page:  ## the web page in a headless browser
	bash tests/page.sh
quickstart:  ## from nothing to a trained model
	bash examples/quickstart.sh
all:  ## what must pass before a change lands
	bash .ci/run
