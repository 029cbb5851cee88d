# make demo: set up and train the demonstration.   make test: set up and run every check.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
ROOMS  := client core edge protos server simulation strategies

.PHONY: demo test fast slow lint house protos clean

# pip, not uv: the constraints pin a CPU build of torch that pip finds on its own.
$(BIN)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: $(BIN)/.ready
	$(BIN)/fedge run examples/compass.toml

test: lint fast slow

fast: $(BIN)/.ready
	$(BIN)/python -m pytest -q -m 'not slow'

slow: $(BIN)/.ready
	$(BIN)/python -m pytest -q -m slow

# The rooms nested as they are imported, for tools that follow names through folders.
house:
	@rm -rf .house && mkdir -p .house/fedge
	@ln -s $(addprefix ../../,$(wildcard app/*)) .house/fedge/
	@ln -s $(addprefix ../../,$(ROOMS)) .house/fedge/

lint: $(BIN)/.ready house
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	cd .house && ../$(BIN)/lint-imports --config ../pyproject.toml

protos: $(BIN)/.ready
	$(BIN)/python tools/generate_protos.py

clean:
	rm -rf .house build *.egg-info
