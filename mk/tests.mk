# Tests. Each tests/<group>/test_*.c is one binary in build/<variant>/tests/<group>/, found by
# wildcard and run by tests/support/run_tests.py, which says at its top how a test is told what.

SIM_SECONDS ?= 60
FUZZ_SECONDS ?= 60
JOBS ?= 2
# What a unit test links. Narrow it while another module does not compile:
#   make unit T=test_block TEST_LIBS='engine proto'
TEST_LIBS ?= daemon front host device engine worker ctl synthetic client cuda cudadriver kernels proto
# T= picks tests by a part of their name.
T ?=

# ------------------------------------------------------------------ binaries

C_TEST_DIRS := tests/unit tests/process tests/crash tests/gpu tests/bench
TEST_SOURCES := $(foreach d,$(C_TEST_DIRS),$(wildcard $(d)/*.c))
TEST_BINARIES := $(patsubst %.c,$(B)/%,$(TEST_SOURCES))
UNIT_BINARIES := $(foreach t,$(or $(T),test_),$(filter $(B)/tests/unit/%,$(foreach b,$(TEST_BINARIES),$(if $(findstring $(t),$(notdir $(b))),$(b)))))
TEST_EXTERN := $(CUNIT_LIBS) $(ZMQ_LIBS) $(PROTOBUF_LIBS) $(XXHASH_LIBS) $(OPENBLAS_LIBS) -ldl -lm

$(TEST_BINARIES): $(B)/%: $(B)/obj/%.o $(CUDA_IMAGES) $(call archive,testsupport $(TEST_LIBS))
	@mkdir -p $(@D)
	$(call say,LD,$@)
	$(Q)$(call link,-pie $(filter %.o,$^),$(filter %.a,$^),$(TEST_EXTERN))

# A libcuda without a GPU, in whose company the cuda device is tested anywhere.
ifeq ($(WITH_CUDA),1)
FAKE_CUDA := $(B)/fake_cuda/libcuda.so.1
FAKE_CUDA_OBJECTS := $(patsubst %.c,$(B)/obj/%.o,$(wildcard tests/fake_cuda/*.c))
$(FAKE_CUDA): $(FAKE_CUDA_OBJECTS)
	@mkdir -p $(@D)
	$(call say,LD,$@)
	$(Q)$(CC) -shared $(LDFLAGS_ALL) $(LDFLAGS) -Wl,-soname,libcuda.so.1 -o $@ $^
endif

unit: $(UNIT_BINARIES) $(FAKE_CUDA) $(CUDA_PLUGIN)

# The simulator: every tests/sim/*.c, with the engine as it is shipped.
SIM_SOURCES := $(wildcard tests/sim/*.c)
SIM_OBJECTS := $(patsubst %.c,$(B)/obj/%.o,$(SIM_SOURCES))
SIM_BINARY := $(if $(SIM_SOURCES),$(BIN)/kvtier-sim)
$(BIN)/kvtier-sim: $(SIM_OBJECTS) $(call archive,testsupport device host engine kernels proto)
	@mkdir -p $(@D)
	$(call say,LD,$@)
	$(Q)$(call link,-pie -Wl$(comma)--wrap=malloc$(comma)--wrap=calloc$(comma)--wrap=realloc $(filter %.o,$^),$(filter %.a,$^),$(PROTOBUF_LIBS) $(XXHASH_LIBS) -ldl -lm)

# Driver plug-ins of tests, each in a daemon.plugin_dir of its own. The daemon's configuration knows the
# drivers cpu and cuda, so they stand in for cuda. Each brings its own copy of the cpu driver.
PLUGIN_SOURCES := $(wildcard tests/process/plugin/*_driver.c)
PLUGINS := $(patsubst tests/process/plugin/%_driver.c,$(B)/tests/plugin/%/kvtier-cuda.so,$(PLUGIN_SOURCES))
$(B)/tests/plugin/%/kvtier-cuda.so: $(B)/obj/tests/process/plugin/%_driver.o $(call archive,device host engine kernels proto)
	@mkdir -p $(@D)
	$(call say,LD,$@)
	$(Q)$(call link,-shared $<,$(filter %.a,$^),-ldl -lm)

# Fuzz targets: build them with VARIANT=fuzz, as `make fuzz` does.
FUZZ_SOURCES := $(wildcard tests/fuzz/fuzz_*.c)
FUZZ_BINARIES := $(patsubst tests/fuzz/%.c,$(B)/fuzz/%,$(FUZZ_SOURCES))
$(B)/fuzz/%: $(B)/obj/tests/fuzz/%.o $(CUDA_IMAGES) $(call archive,testsupport $(TEST_LIBS))
	@mkdir -p $(@D)
	$(call say,LD,$@)
	$(Q)$(call link,-fsanitize=fuzzer -pie $(filter %.o,$^),$(filter %.a,$^),$(filter-out $(CUNIT_LIBS),$(TEST_EXTERN)))

TEST_OBJECTS := $(patsubst %.c,$(B)/obj/%.o,$(TEST_SOURCES) $(PLUGIN_SOURCES) $(SIM_SOURCES) $(FUZZ_SOURCES))
EXAMPLE_OBJECTS := $(patsubst %.c,$(B)/obj/%.o,$(EXAMPLE_SOURCES))
MAIN_OBJECTS := $(patsubst %.c,$(B)/obj/%.o,$(wildcard $(foreach p,$(PROGRAM_NAMES),$(MAIN_$(p)))))
ALL_OBJECTS := $(foreach m,$(MODULES),$(OBJECTS_$(m))) $(MAIN_OBJECTS) $(TEST_OBJECTS) $(EXAMPLE_OBJECTS) $(FAKE_CUDA_OBJECTS)

.SECONDARY: $(ALL_OBJECTS) $(CUDA_IMAGES) $(CUDA_IMAGES:.o=)
-include $(ALL_OBJECTS:.o=.d)

# ------------------------------------------------------------------ Python

VENV := build/venv
PYTHON := $(VENV)/bin/python
.PHONY: venv venv-torch
venv: $(VENV)/.ok
venv-torch: $(VENV)/.torch-ok
$(VENV)/.ok: tests/python/requirements.txt
	$(call say,PIP,$<)
	$(Q)scripts/venv $(VENV) $<
	@touch $@
$(VENV)/.torch-ok: tests/python/requirements-torch.txt | $(VENV)/.ok
	$(call say,PIP,$<)
	$(Q)scripts/venv $(VENV) $<
	@touch $@

# ------------------------------------------------------------------ running them

# make test-unit test-process T=word: one of the groups has a test of that name, not each.
GROUPS_BESIDE := $(patsubst test-%,%,$(filter test-unit test-process test-python,$(MAKECMDGOALS)))
RUN := tests/support/run_tests.py --jobs $(JOBS) --sim-seconds $(SIM_SECONDS) --fuzz-seconds $(FUZZ_SECONDS) $(if $(T),--only '$(T)' --beside $(GROUPS_BESIDE))
# Goals that set up and then build make again, with all cores unless a -j was given.
PARALLEL = --no-print-directory $(if $(filter -j% --jobserver%,$(MAKEFLAGS)),,-j$(shell nproc))

.PHONY: setup test test-build test-gpu test-unit test-process test-python test-kill test-asan test-tsan sim sim-build sim-rules fuzz fuzz-build
.PHONY: lint format model demo bench venv-llama

# The peer of `make bench llama`: compiles for about eight minutes.
venv-llama:
	@scripts/setup build python
	python3 -m venv build/venv-llama
	build/venv-llama/bin/pip install --quiet -r tests/bench/requirements-llama.txt


setup:
	@scripts/setup

# Set-up comes before anything is built, and pkg-config is asked afresh after it: so make again.
test:
	@scripts/setup build test python
	@$(MAKE) $(PARALLEL) test-build
	@$(MAKE) $(PARALLEL) VARIANT=fuzz fuzz-build
	@$(MAKE) $(PARALLEL) VARIANT=mutant sim-build
	@scripts/fetch-model || echo 'SKIP model: not fetched, so the tests that need it are skipped'
	@$(RUN) --variant release lint unit sim process crash fuzz python

test-build: all unit $(TEST_BINARIES) $(PLUGINS) $(SIM_BINARY) venv
fuzz-build: $(FUZZ_BINARIES)
sim-build: $(SIM_BINARY)

# One layer at a time, for the daily work: make test-unit T=block
test-unit: unit
	@$(RUN) --variant $(VARIANT) unit
test-process: test-build
	@$(RUN) --variant $(VARIANT) process
test-python: test-build
	@$(RUN) --variant $(VARIANT) python

# What needs a GPU: make test-gpu GPU_CHECKS='share exact'; tests/gpu/run.py --list names them.
test-gpu: all
	@tests/gpu/run.py $(GPU_CHECKS)

# Workers on tiny budgets, one of them killed at a random moment so many times: synthetic ones, kvtier-run
# with a tiny model, and 5 times with the real one: make test-kill KILLS=1000
KILLS ?= 200
test-kill:
	@scripts/setup build test python
	@$(MAKE) $(PARALLEL) test-build
	@scripts/fetch-model || echo 'SKIP model: not fetched, so the 5 kills with it are skipped'
	@KILLS=$(KILLS) $(RUN) --variant $(VARIANT) process --only test_faults
	@KVT_KILLS=$(KILLS) $(RUN) --variant $(VARIANT) crash

# The sanitizers take several times as long, so the simulator gets a third of the time.
test-asan test-tsan: test-%:
	@scripts/setup build test python
	@$(MAKE) $(PARALLEL) VARIANT=$* test-build
	@$(RUN) --sim-seconds $$((($(SIM_SECONDS) + 2) / 3)) --variant $* unit sim process crash

# make sim SEED=n replays one seed; without SEED it tries fresh ones for SIM_SECONDS.
sim: $(SIM_BINARY)
	$(if $(SIM_BINARY),$(SIM_BINARY) $(if $(SEED),--seed $(SEED),--seconds $(SIM_SECONDS)) $(SIM_ARGS),@echo 'SKIP sim: tests/sim is empty')

# Leaves each rule of the engine out in turn, and says after how many seeds that is noticed.
sim-rules:
	@$(MAKE) $(PARALLEL) VARIANT=mutant sim-build
	@build/mutant/bin/kvtier-sim --break-all --from 1 $(SIM_ARGS)

fuzz:
	@scripts/setup build test
	@$(MAKE) $(PARALLEL) VARIANT=fuzz fuzz-build
	@$(RUN) --variant release fuzz

lint:
	@scripts/setup build test lint
	@tests/lint/lint.py
	@for how in 'gcc -x c -std=c99' 'clang -x c -std=c11' 'clang -x c++ -nostdinc++ -std=c++11'; do \
	    $$how -fsyntax-only -Wall -Wextra -Werror client/kvtier.h || exit 1; done
	@$(MAKE) $(PARALLEL) VARIANT=lint objects
	@$(MAKE) $(PARALLEL) VARIANT=clang objects
	@echo 'lint: clean'

format:
	@scripts/format

model:
	@scripts/setup python
	@scripts/fetch-model

demo:
ifneq ($(MODEL),)
	@test -f "$$MODEL" || { echo "demo: MODEL=$$MODEL:" \
	    "$$(test -d "$$MODEL" && echo that is a directory || echo there is no such file); give a GGUF file of" \
	    "the Llama family, or leave MODEL out: then one is fetched" >&2; exit 1; }
endif
	@scripts/setup build python
	@$(MAKE) $(PARALLEL) all
	$(if $(MODEL),,@scripts/fetch-model)
	@scripts/demo

bench:
	@scripts/setup build test python
	@$(MAKE) $(PARALLEL) all test-build
	@scripts/fetch-model
	@tests/bench/run.py $(BENCH_ARGS)
