# Compilers and flags. `make VARIANT=asan ...` builds the same things with other flags into
# build/asan/; the variants never share an object.
#
#   release  what is shipped: gcc, -O2, asserts on          lint   gcc, warnings are errors
#   asan     gcc, AddressSanitizer + UBSan                  clang  clang, warnings are errors
#   tsan     gcc, ThreadSanitizer                           fuzz   clang, libFuzzer + ASan + UBSan
#   mutant   release plus -DKVT_MUTANTS=1: switches that leave a rule out, to see a test notice

VARIANT ?= release
VARIANTS := release lint clang asan tsan fuzz mutant
ifeq ($(filter $(VARIANT),$(VARIANTS)),)
$(error VARIANT=$(VARIANT) is unknown; one of: $(VARIANTS))
endif

B := build/$(VARIANT)
BIN := $(B)/bin
LIB := $(B)/lib

# Set WERROR=1 to make warnings errors in any variant; lint and clang always do.
WERROR ?=

CC := gcc
OPT := -O2 -g
SANITIZE :=
HARDEN := -fstack-protector-strong -U_FORTIFY_SOURCE -D_FORTIFY_SOURCE=2
VARIANT_CPPFLAGS :=

ifeq ($(VARIANT),lint)
WERROR := 1
endif
ifeq ($(VARIANT),clang)
CC := clang
WERROR := 1
endif
ifeq ($(VARIANT),asan)
OPT := -O1 -g -fno-omit-frame-pointer
SANITIZE := -fsanitize=address,undefined -fno-sanitize-recover=undefined
HARDEN :=
endif
ifeq ($(VARIANT),tsan)
OPT := -O1 -g -fno-omit-frame-pointer
SANITIZE := -fsanitize=thread
HARDEN :=
endif
ifeq ($(VARIANT),fuzz)
CC := clang
OPT := -O1 -g -fno-omit-frame-pointer
SANITIZE := -fsanitize=fuzzer-no-link,address,undefined -fno-sanitize-recover=undefined
HARDEN :=
VARIANT_CPPFLAGS := -DFUZZING_BUILD_MODE_UNSAFE_FOR_PRODUCTION=1
endif
ifeq ($(VARIANT),mutant)
VARIANT_CPPFLAGS := -DKVT_MUTANTS=1
endif

WARN := -Wall -Wextra -Wshadow -Wstrict-prototypes -Wmissing-prototypes -Wvla -Wundef \
        -Wpointer-arith -Wwrite-strings -Wformat=2 -Wno-unused-parameter
WARN += $(if $(WERROR),-Werror)

# -D_GNU_SOURCE= (empty, not 1) lets a file also say `#define _GNU_SOURCE` without a warning.
CPPFLAGS_ALL := -I. -I$(B) -D_GNU_SOURCE= -DKVT_VERSION='"$(VERSION)"' $(VARIANT_CPPFLAGS)
CFLAGS_ALL := -std=gnu11 $(OPT) -fPIC -fvisibility=hidden -pthread $(WARN) $(HARDEN) $(SANITIZE)
LDFLAGS_ALL := -pthread -Wl,-z,relro,-z,now -Wl,--as-needed $(SANITIZE)

# What the user adds comes last: make CFLAGS=-O0
CPPFLAGS ?=
CFLAGS ?=
LDFLAGS ?=

# Matrix products and the like gain from -O3. No -march=native: a binary runs on any x86-64;
# a kernel that wants AVX2 or F16C says so with __attribute__((target)) and picks at run time.
KERNEL_CFLAGS := $(if $(filter asan tsan fuzz,$(VARIANT)),,-O3)

# ------------------------------------------------------------------ libraries from outside

PKG_CONFIG ?= pkg-config
pkg_cflags = $(shell $(PKG_CONFIG) --cflags $(1) 2>/dev/null)
pkg_libs = $(shell $(PKG_CONFIG) --libs $(1) 2>/dev/null)

ZMQ_LIBS := $(or $(call pkg_libs,libzmq),-lzmq)
PROTOBUF_LIBS := $(or $(call pkg_libs,libprotobuf-c),-lprotobuf-c)
XXHASH_LIBS := $(or $(call pkg_libs,libxxhash),-lxxhash)
CUNIT_LIBS := $(or $(call pkg_libs,cunit),-lcunit)
OPENBLAS_CFLAGS := $(call pkg_cflags,openblas)
OPENBLAS_LIBS := $(or $(call pkg_libs,openblas),-lopenblas)

# CUDA is found by itself: nvcc for kernels, and the driver API's header; nothing is linked, libcuda is
# opened at run time. WITH_CUDA=0 turns it off, CUDA_HOME=/usr/local/cuda names another toolkit.
NVCC ?= $(shell command -v nvcc 2>/dev/null)
CUDA_HOME ?= $(or $(if $(NVCC),$(realpath $(shell $(NVCC) --dryrun -x cu /dev/null 2>&1 | sed -n 's/^\#\$$ TOP=//p'))),/usr/local/cuda)
CUDA_HEADER := $(wildcard $(CUDA_HOME)/include/cuda.h)
WITH_CUDA ?= $(if $(and $(NVCC),$(CUDA_HEADER)),1,0)
ifeq ($(WITH_CUDA),1)
CPPFLAGS_ALL += -isystem $(CUDA_HOME)/include -DKVT_WITH_CUDA=1
else
CPPFLAGS_ALL += -DKVT_WITH_CUDA=0
$(info SKIP cuda: $(if $(and $(NVCC),$(CUDA_HEADER)),WITH_CUDA=$(WITH_CUDA),$(if $(NVCC),$(CUDA_HOME)/include/cuda.h is not there,nvcc is not installed)): no CUDA plug-in is built, and libkvtier has no cuda device)
endif
