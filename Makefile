# `make demo` and `make test` are all a new clone needs: each makes its own environment from PyPI, of the versions in
# constraints/. Only `make test-newest` takes what is newest today.
PYTHON ?= python3
VENV := .venv
OLDEST := .venv-oldest
EXTRAS := .venv-extras
NEWEST := .venv-newest
# What `make test-newest` tests with, such as "transformers @ https://github.com/huggingface/transformers/archive/main.tar.gz"
TRANSFORMERS ?= transformers

# Where `make tiny` keeps its data, checkpoints and results; it goes on where it was interrupted.
TINY := build/tiny

# A process per core, each with one thread, takes whole files of tests, in the order of their names: by number of tests,
# slow files with few tests would come last.
PARALLEL := --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder
test test-oldest test-newest test-extras: export OMP_NUM_THREADS := 1

.PHONY: help demo tiny tiny-qwen3 several distilled test test-oldest test-newest test-extras lint constraints clean

help:
	@echo "make demo         the tiny trained model answers questions about an unseen clip"
	@echo "make tiny         train the tiny VideoNSA and its dense twin on 2 cores, and measure both"
	@echo "make several      go on with the tiny model, and a dense twin of it: clips with two or three shapes, long clips"
	@echo "make distilled    give two dense twins gates that learn from their own attention, and measure them"
	@echo "make tiny-qwen3   train a tiny model on Qwen3-VL's architecture, and measure it"
	@echo "make test         all tests, on the newest tested versions (constraints/tested.txt)"
	@echo "make test-oldest  all tests, on the oldest supported ones (constraints/oldest.txt)"
	@echo "make test-newest  all tests, on the newest versions that there are, tested or not"
	@echo "make test-extras  tests of lmms-eval, quantization and serving, which make test skips (constraints/extras.txt)"
	@echo "make lint         ruff"
	@echo "make constraints  write constraints/ anew, from the ranges in setup.cfg (Python 3.11)"
	@echo "make clean        remove the environments"

demo: $(VENV)/demo.stamp
	@$(VENV)/bin/python examples/demo.py

tiny: $(TINY)/paper-4.json $(TINY)/dense-4.json

distilled: $(foreach twin,dense-4 dense-several,$(foreach step,distilled answers lora,$(TINY)/$(step)-$(twin).json))

several: $(foreach model,several dense-several several-longer long,$(TINY)/$(model).json)

tiny-qwen3: $(TINY)/qwen3.json

test: $(VENV)/test.stamp
	$(VENV)/bin/python -m pytest $(PARALLEL)

test-oldest: $(OLDEST)/test.stamp
	$(OLDEST)/bin/python -m pytest $(PARALLEL)

test-newest: newest-environment
	$(NEWEST)/bin/python -m pytest $(PARALLEL)

test-extras: $(EXTRAS)/test.stamp
	$(EXTRAS)/bin/python -m pytest -m needs

lint: $(VENV)/test.stamp
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

constraints:
	$(PYTHON) constraints/resolve.py

clean:
	rm -rf $(VENV) $(OLDEST) $(EXTRAS) $(NEWEST)

# pip says what goes wrong, and nothing else: neither that there is a newer pip, nor what it found where.
PIP_INSTALL := bin/python -m pip install --disable-pip-version-check --quiet --quiet

# environment(folder, its versions)
define environment
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	@echo "Installing $(2) into $(1)."
	@echo "PyTorch is several GB: this takes a few minutes on a fast line."
	@$(PYTHON) -m venv $(1)
endef

# install(environment, extra, constraints): setuptools comes first, so that no other one builds the package.
define install
	$(call environment,$(1),the versions of $(3))
	@$(1)/$(PIP_INSTALL) --constraint $(3) setuptools
	@$(1)/$(PIP_INSTALL) --constraint $(3) --no-build-isolation --editable ".[$(2)]"
	@touch $@
endef

$(VENV)/%.stamp: setup.cfg pyproject.toml constraints/tested.txt
	$(call install,$(VENV),$*,constraints/tested.txt)

$(OLDEST)/%.stamp: setup.cfg pyproject.toml constraints/oldest.txt
	$(call install,$(OLDEST),$*,constraints/oldest.txt)

# What $(VENV) lacks, or has in newer versions, in front of $(VENV): torch is not installed a second time.
$(EXTRAS)/test.stamp: $(VENV)/test.stamp constraints/extras.txt
	@echo "Installing the versions of constraints/extras.txt into $(EXTRAS), where $(VENV) has others."
	@$(VENV)/bin/python -m venv $(EXTRAS)
	@$(VENV)/bin/python -c '$(SITE)' > "$$($(EXTRAS)/bin/python -c '$(SITE)')/tested.pth"
	@$(EXTRAS)/$(PIP_INSTALL) --constraint constraints/extras.txt setuptools
	@$(EXTRAS)/$(PIP_INSTALL) --constraint constraints/extras.txt --no-build-isolation --editable ".[test,ecosystem,eval]"
	@touch $@

SITE = import sysconfig; print(sysconfig.get_path("purelib"))

# No stamp: what is newest may be newer next time. The package itself is installed without asking what it allows.
.PHONY: newest-environment
newest-environment:
	$(call environment,$(NEWEST),the newest versions of all packages)
	@$(NEWEST)/$(PIP_INSTALL) --upgrade --upgrade-strategy eager \
	    $$($(PYTHON) constraints/resolve.py --newest) "$(TRANSFORMERS)"
	@$(NEWEST)/$(PIP_INSTALL) --no-deps --no-build-isolation --editable .
	@$(NEWEST)/bin/python -m pip list --disable-pip-version-check

.SECONDARY:  # keep what later steps are made from

# One thread trains, a second process decodes.
$(TINY)/%: PY := OMP_NUM_THREADS=1 $(VENV)/bin/python
$(TINY)/%: MAKE_CLIPS = $(PY) examples/make_needle_videos.py $@

$(TINY)/start: | $(VENV)/train.stamp
	$(PY) examples/make_tiny.py $@

$(TINY)/data-1: | $(VENV)/train.stamp
	$(MAKE_CLIPS) --seed 1 --train 16000 --validation 256 --seconds 0.5 --questions describe

$(TINY)/data-2: | $(VENV)/train.stamp
	$(MAKE_CLIPS) --seed 2 --train 6000 --validation 128 --seconds 0.5 1 --stills 0.4

$(TINY)/data-3: | $(VENV)/train.stamp
	$(MAKE_CLIPS) --seed 3 --train 10000 --validation 256 --seconds 1 2 4 4 8 --stills 0.12

# Long clips of as many frames as 8 s have: their positions, not their length.
$(TINY)/data-4a: | $(VENV)/train.stamp
	$(MAKE_CLIPS) --seed 41 --train 2000 --seconds 16 --fps 2 --needle_seconds 1 3

$(TINY)/data-4b: | $(VENV)/train.stamp
	$(MAKE_CLIPS) --seed 42 --train 2000 --seconds 32 --fps 1 --needle_seconds 2 6

$(TINY)/data-4c: | $(VENV)/train.stamp
	$(MAKE_CLIPS) --seed 43 --train 2000 --seconds 64 --fps 0.5 --needle_seconds 4 12

# Two or three shapes in a clip.
$(TINY)/data-several-short: | $(VENV)/train.stamp
	$(MAKE_CLIPS) --seed 63 --train 10000 --validation 128 --seconds 2 --needles 2 3 --needle_seconds 0.25 0.5

$(TINY)/data-several: | $(VENV)/train.stamp
	$(MAKE_CLIPS) --seed 61 --train 6000 --validation 128 --seconds 2 4 4 8 --needles 2 3

# Long clips at the frame rate of the short ones.
$(TINY)/data-long: | $(VENV)/train.stamp
	$(MAKE_CLIPS) --seed 44 --train 600 --validation 32 --seconds 16 32

# For gates that learn from a dense twin, which needs no answers (docs/distill.md), and for what it then answers.
$(TINY)/data-distill: | $(VENV)/train.stamp
	$(MAKE_CLIPS) --seed 71 --train 1000 --validation 64 --seconds 4 8 16 32 --needles 1 2 3

$(TINY)/data-several-long: | $(VENV)/train.stamp
	$(MAKE_CLIPS) --seed 8 --test 120 --seconds 8 16 32 --needles 2 3

$(TINY)/data-test: | $(VENV)/train.stamp
	$(MAKE_CLIPS) --seed 4 --test 500 --seconds 4 8 16 32 64

# stage(number, model to start from, data[, further options])
define stage
	$(PY) examples/finetune.py --config examples/recipes/tiny-$(1).yaml --model $(2) --output_dir $(@D) \
	    --train_data $(3) --eval_data $(firstword $(subst /train.jsonl, ,$(3)))/validation.jsonl $(4) \
	    $(if $(wildcard $(@D)/checkpoint-*),--resume_from_checkpoint last)
endef

$(TINY)/stage-1/README.md: | $(TINY)/start $(TINY)/data-1
	$(call stage,1,$(TINY)/start,$(TINY)/data-1/train.jsonl)

$(TINY)/stage-2/README.md: | $(TINY)/stage-1/README.md $(TINY)/data-2
	$(call stage,2,$(TINY)/stage-1,$(TINY)/data-2/train.jsonl)

$(TINY)/paper/README.md: | $(TINY)/stage-2/README.md $(TINY)/data-3
	$(call stage,3,$(TINY)/stage-2,$(TINY)/data-3/train.jsonl)

$(TINY)/dense/README.md: | $(TINY)/stage-2/README.md $(TINY)/data-3
	$(call stage,3,$(TINY)/stage-2,$(TINY)/data-3/train.jsonl,--nsa_variant dense)

ONE_SHAPE := $(TINY)/data-3/train.jsonl%40 $(patsubst %,$(TINY)/data-4%/train.jsonl,a b c)
SEVERAL_SHAPES := $(TINY)/data-several/train.jsonl $(TINY)/data-3/train.jsonl%25

$(TINY)/%-4/README.md: | $(TINY)/%/README.md $(TINY)/data-4a $(TINY)/data-4b $(TINY)/data-4c
	$(call stage,4,$(TINY)/$*,$(ONE_SHAPE),--nsa_variant $*)

# From the model in examples/tiny, the sparse one and its dense twin.
$(TINY)/several-short/README.md $(TINY)/dense-several-short/README.md: | $(TINY)/data-several-short
	$(call stage,5,tiny,$(TINY)/data-several-short/train.jsonl,--nsa_variant $(if $(findstring dense,$@),dense,paper))

$(TINY)/several/README.md $(TINY)/dense-several/README.md: $(TINY)/%/README.md: \
    | $(TINY)/%-short/README.md $(TINY)/data-several $(TINY)/data-3
	$(call stage,6,$(TINY)/$*-short,$(SEVERAL_SHAPES),--nsa_variant $(if $(findstring dense,$@),dense,paper))

$(TINY)/several-longer/README.md: | $(TINY)/several/README.md
	$(call stage,6,$(TINY)/several,$(SEVERAL_SHAPES),--max_steps 600 --learning_rate 6e-4)

$(TINY)/long/README.md: | $(TINY)/data-long $(TINY)/data-3
	$(call stage,7,tiny,$(TINY)/data-long/train.jsonl $(TINY)/data-3/train.jsonl%10)

# New gates for a dense twin.
$(TINY)/distilled-%/README.md: | $(TINY)/%/README.md $(TINY)/data-distill
	$(call stage,distill,$(TINY)/$*,$(TINY)/data-distill/train.jsonl)

# The same gates, which then learn from answers for a few minutes, alone or with adapters.
GATES := --method gates --max_steps 300 --learning_rate 3e-3
ADAPTERS := --method lora --lora_dropout 0 --max_steps 100 --learning_rate 2e-3
from_answers = --nsa_variant paper --train_vision false --warmup_steps 10 $(if $(findstring lora,$@),$(ADAPTERS),$(GATES))

$(TINY)/answers-dense-4/README.md $(TINY)/lora-dense-4/README.md: | $(TINY)/distilled-dense-4/README.md
	$(call stage,4,$(TINY)/distilled-dense-4,$(ONE_SHAPE),$(from_answers))

$(TINY)/answers-dense-several/README.md $(TINY)/lora-dense-several/README.md: | $(TINY)/distilled-dense-several/README.md
	$(call stage,6,$(TINY)/distilled-dense-several,$(SEVERAL_SHAPES),$(from_answers))

# measure_gates(model[, further options])
define measure_gates
	$(PY) examples/measure_gates.py $(1) $(TINY)/$(if $(findstring several,$*),data-several-long,data-test)/test.jsonl $@ \
	    --clips 25 --answers paper merged --batch_size 8 --max_new_tokens 12 --workers 1 $(2)
endef

$(TINY)/distilled-%.json: | $(TINY)/distilled-%/README.md $(TINY)/data-test $(TINY)/data-several-long
	$(call measure_gates,$(@:.json=),--temperatures 0.8 1.25)

$(TINY)/answers-%.json: | $(TINY)/answers-%/README.md $(TINY)/data-test $(TINY)/data-several-long
	$(call measure_gates,$(@:.json=))

$(TINY)/lora-%.json: | $(TINY)/lora-%/README.md $(TINY)/data-test $(TINY)/data-several-long
	$(call measure_gates,$(@:.json=)/adapter,--teacher $(TINY)/$*)

# On Qwen3-VL's architecture, colour and time alone.
$(TINY)/qwen3-start: | $(VENV)/train.stamp
	$(PY) examples/make_tiny.py $@ --backbone qwen3_vl

$(TINY)/qwen3-data-1: | $(VENV)/train.stamp
	$(MAKE_CLIPS) --seed 71 --train 6000 --validation 64 --seconds 0.5 --size 128 --questions colour

$(TINY)/qwen3-data-2: | $(VENV)/train.stamp
	$(MAKE_CLIPS) --seed 72 --train 4000 --validation 64 --test 200 --seconds 4 --size 128 --questions colour when

$(TINY)/qwen3-1/README.md: | $(TINY)/qwen3-start $(TINY)/qwen3-data-1
	$(call stage,1,$(TINY)/qwen3-start,$(TINY)/qwen3-data-1/train.jsonl,--max_steps 250)

$(TINY)/qwen3/README.md: | $(TINY)/qwen3-1/README.md $(TINY)/qwen3-data-2
	$(call stage,qwen3,$(TINY)/qwen3-1,$(TINY)/qwen3-data-2/train.jsonl)

$(TINY)/qwen3.json: | $(TINY)/qwen3/README.md $(TINY)/qwen3-data-2
	$(PY) examples/evaluate.py $(TINY)/qwen3 $(TINY)/qwen3-data-2/test.jsonl $@ --batch_size 8 --max_new_tokens 4 --workers 1

EVALUATE = $(PY) examples/evaluate.py $(TINY)/$*

$(TINY)/several.json $(TINY)/dense-several.json $(TINY)/several-longer.json: $(TINY)/%.json: \
    | $(TINY)/%/README.md $(TINY)/data-several-long
	$(EVALUATE) $(TINY)/data-several-long/test.jsonl $@ --batch_size 8 --max_new_tokens 12 --workers 1

$(TINY)/%.json: | $(TINY)/%/README.md $(TINY)/data-test
	$(EVALUATE) $(TINY)/data-test/test.jsonl $@ --batch_size 8 --max_new_tokens 12 --workers 1
