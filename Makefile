# The project's tasks. `make` lists them.
.PHONY: help test slow lint types site wheel page quickstart all
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
site:  ## the documentation as a site, in site/
	bash tests/site.sh site
page:  ## the web page in a headless browser
	bash tests/page.sh
wheel:  ## the wheel, from an empty folder
	bash tests/wheel.sh
quickstart:  ## from nothing to a trained model
	bash examples/quickstart.sh
all:  ## what must pass before a change lands
	bash .ci/run
