# kvtierd: build, test, install. GNU make, nothing else. `make help` lists the targets.
#
# How it works, in five lines:
#   * A folder is a module: every *.c in it is compiled into one static archive, found by
#     wildcard. A file called main.c holds a program's main() and stays out of the archive.
#   * Everything built lies in build/<variant>/; variants differ in compiler and flags only.
#   * A module whose folder is still empty is left out, and so is a program without main.c.
#   * Tests link all internal archives; the linker takes what is used.
#   * Long recipes are scripts in scripts/; this file only says what depends on what.

MAKEFLAGS += --no-builtin-rules
.SUFFIXES:
.DELETE_ON_ERROR:
.DEFAULT_GOAL := all

# The version is said once, in the public header.
VERSION := $(shell awk '/define KVTIER_VERSION_(MAJOR|MINOR|PATCH)/ {v = v dot $$3; dot = "."} \
    END {print v}' client/kvtier.h)
# The library's ABI number: the N of libkvtier.so.N. See CONTRIBUTING.md, "Versions".
SOVERSION := 0

include mk/variants.mk
include mk/build.mk
include mk/tests.mk
include mk/install.mk
include mk/bundle.mk

# ------------------------------------------------------------------ what people call

.PHONY: all engine daemon client worker examples objects unit clean help
all: $(call archive,$(filter-out testsupport,$(MODULES))) $(PROGRAMS) $(CUDA_PLUGIN) $(PUBLIC_LIBS) $(EXAMPLES)
engine: $(call archive,proto kernels engine)
daemon: $(call archive,proto kernels engine device host daemon front) $(call program,kvtierd kvtierd-front) $(CUDA_PLUGIN)
client: $(call archive,proto client ctl) $(PUBLIC_LIBS) $(call program,kvtierctl)
worker: $(call archive,proto kernels client worker synthetic) $(call program,kvtier-run kvtier-synth)
examples: $(EXAMPLES)

# Every object of every module, test and example, but nothing linked: what `make lint` compiles.
objects: $(ALL_OBJECTS)

clean:
	rm -rf build

define HELP
For users
  make demo            set up, build, fetch the model, show it at work
  make test            set up, build, run every test that needs no GPU
  make                 build what is in build/bin and build/release/lib
  make install         PREFIX=/usr/local DESTDIR=
  make bundle          build/bundle: runs on hosts without our packages, wherever it is moved
  make model           fetch the model that demo and tests use
  make clean           remove build/

For contributors
  make lint            arrows between folders, format, banned calls, warnings as errors
  make format          format what differs from .clang-format
  make test-asan       unit, process and simulation under ASan + UBSan
  make test-tsan       the same under TSan
  make test-gpu        what needs a GPU; GPU_CHECKS='share exact' names some
  make test-kill       KILLS=200 workers killed at random moments on tiny budgets
  make sim SEED=n      replay one seed of the simulator (without SEED: fresh ones)
  make sim-rules       leave each rule of the engine out: after how many seeds is it noticed?
  make fuzz            FUZZ_SECONDS=60, spread over every parser
  make bench           ratios, written for docs/benchmarks.md
  make venv-torch      add torch and transformers to build/venv, for the logits comparison

One part at a time
  make engine | daemon | client | worker | examples | unit
  make test-unit T=block             build and run unit tests with "block" in their names
  make unit T=test_block TEST_LIBS='engine proto'   link only these modules
  make VARIANT=asan ...              variants: $(VARIANTS)
  make V=1 ...                       show the commands in full
endef
help:
	$(info $(HELP))
	@:
