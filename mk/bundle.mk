# make bundle: build/bundle/, which travels to hosts without our packages. Same objects as everything
# else, linked once more with a search path relative to the program. DT_RPATH and not DT_RUNPATH: it
# also holds for what the libraries need.

BUNDLE := build/bundle
BUNDLE_NAMES := $(PROGRAM_NAMES)
# What tests/gpu measures there beside them.
ifeq ($(WITH_CUDA),1)
BUNDLE_NAMES += bench_stream_ops
MAIN_bench_stream_ops := tests/bench/bench_stream_ops.c
IMAGES_bench_stream_ops := $(CUDA_IMAGES)
USES_bench_stream_ops := cuda
EXTERN_bench_stream_ops := -ldl -lm
endif
# OpenBLAS alone would be larger than all of the bundle may be: there kvtier-run multiplies matrices
# with plain loops, slower with long prompts on the CPU, equal otherwise.
BUNDLE_BLAS := $(B)/obj/mk/bundle_blas.o

define bundle_program_rule
$(B)/bundle/$(1): $(B)/obj/$$(MAIN_$(1):.c=.o) $$(IMAGES_$(1)) $(if $(filter kvtier-run,$(1)),$(BUNDLE_BLAS)) $$(call archive,$$(USES_$(1)))
	@mkdir -p $$(@D)
	$$(call say,LD,$$@)
	$$(Q)$$(call link,-pie $$(filter %.o,$$^),$$(filter %.a,$$^),$$(filter-out $(OPENBLAS_LIBS),$$(EXTERN_$(1))))
endef
$(foreach p,$(BUNDLE_NAMES),$(eval $(call bundle_program_rule,$(p))))
$(B)/bundle/%: private LDFLAGS += -Wl,--disable-new-dtags -Wl,-rpath,'$$ORIGIN/../lib'
$(BUNDLE_BLAS): private MODULE_CFLAGS := $(KERNEL_CFLAGS) $(OPENBLAS_CFLAGS)

.PHONY: bundle
bundle: $(patsubst %,$(B)/bundle/%,$(BUNDLE_NAMES)) $(CUDA_PLUGIN)
	$(Q)scripts/bundle $(BUNDLE) '$(CUDA_PLUGIN)' $(patsubst %,$(B)/bundle/%,$(BUNDLE_NAMES))
