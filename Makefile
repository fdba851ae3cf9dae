# Everything is made inside .venv in this clone; a target that is up to date does nothing.

PYTHON ?= python3
PYTEST = .venv/bin/python -m pytest
PORT ?= 8000
NAME ?= smollm2-135m
FOLDER_smollm2-135m = SmolLM2-135M-Instruct
FOLDER_qwen2.5-coder-0.5b = Qwen2.5-Coder-0.5B-Instruct
FOLDER_qwen2.5-coder-1.5b = Qwen2.5-Coder-1.5B-Instruct
MADE_MODEL = $(CURDIR)/.venv/models/$(FOLDER_$(NAME))
AASD_TEST_MODEL ?= $(MADE_MODEL)
export FLAVOUR MODEL AASD_TEST_MODEL
ifeq ($(strip $(MODEL)),)
AASD_CACHE_ROOT ?= $(CURDIR)/.venv/cache
export AASD_CACHE_ROOT
endif

.DEFAULT_GOAL := help
.PHONY: help setup model prior serve demo bench lint test test-long soak docs clean

help:
	@echo 'make setup      install everything into .venv (FLAVOUR=cpu|cuda; by default what the machine has)'
	@echo 'make model      make a small chat model, and print its path'
	@echo '                (NAME=smollm2-135m|qwen2.5-coder-0.5b|qwen2.5-coder-1.5b; prior, serve, demo and bench take it, too)'
	@echo "make prior      complete the model's prior, which drafts begin from (about five minutes, once)"
	@echo 'make serve      serve it with method aasd (MODEL=path-or-name PORT=8000 ARGS="further vllm arguments")'
	@echo 'make demo       compare answers and speed with and without aasd (ARGS="arguments of benchmarks.demo")'
	@echo 'make lint       check style and types (ruff, mypy)'
	@echo 'make test       run the tests (ARGS="arguments of pytest")'
	@echo 'make test-long  run the tests that take long'
	@echo 'make soak       send a real server random requests, events and faults for an hour (ARGS="--minutes 5 --seed 3")'
	@echo 'make bench      measure speed against no speculation, ngram and suffix, and update the tables (ARGS="--data FILE --resume")'
	@echo 'make docs       write the generated tables of docs/, and build the site into site/'
	@echo 'make clean      remove .venv and all that was built'

setup:
	@$(PYTHON) tools/environment.py

model: setup
	@.venv/bin/python tools/models.py $(NAME)

prior: model
	@HF_HUB_OFFLINE=1 VLLM_CPU_KVCACHE_SPACE=1 .venv/bin/python -m vllm_aasd.prior $(MADE_MODEL)

# vLLM takes the last of equal arguments, so ARGS override ours. By default it would take most of a CPU's memory.
serve: $(if $(strip $(MODEL)),setup,model)
	@echo "[aasd] after 'Application startup complete.', ask it something:"
	@echo "  curl -s http://localhost:$(PORT)/v1/chat/completions -H 'Content-Type: application/json' \\"
	@echo "       -d '{\"messages\": [{\"role\": \"user\", \"content\": \"Hello!\"}]}'"
	@exec env VLLM_CPU_KVCACHE_SPACE=$${VLLM_CPU_KVCACHE_SPACE:-2} .venv/bin/vllm serve $(or $(strip $(MODEL)),$(MADE_MODEL)) \
		--host 127.0.0.1 --port $(PORT) --speculative-config '{"method":"aasd"}' $(ARGS)

demo: model
	@.venv/bin/python -m benchmarks.demo --model $(or $(strip $(MODEL)),$(MADE_MODEL)) $(ARGS)

bench: prior
	@.venv/bin/python -m benchmarks.end_to_end --builtin --methods none ngram suffix aasd --concurrency 1 8 32 --limit 8 8 32 --rounds 2 --core 0 --model $(or $(strip $(MODEL)),$(MADE_MODEL)) $(ARGS)
	@.venv/bin/python -m benchmarks.report

lint: setup
	@.venv/bin/ruff check
	@.venv/bin/ruff format --check
	@.venv/bin/mypy

test: model
	@$(PYTEST) -n 2 --dist loadgroup --no-loadscope-reorder -m 'not long' --durations=15 $(ARGS)

test-long: model
	@$(PYTEST) -m long $(ARGS)

soak: model
	@PYTHONPATH=tests/support .venv/bin/python -m aasd_testing.fuzz.soak $(ARGS)

docs: setup
	@.venv/bin/python tools/docs.py
	@.venv/bin/mkdocs build --strict

clean:
	rm -rf .venv .bench site build dist *.egg-info .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
