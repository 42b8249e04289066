# Modules, programs and the public library.

comma := ,

# ------------------------------------------------------------------ modules: name and folders

MODULES := proto kernels engine device host daemon front client ctl worker synthetic testsupport
MODULES += $(if $(filter 1,$(WITH_CUDA)),cuda cudadriver)

DIRS_proto := proto
DIRS_kernels := kernels
DIRS_engine := tiers/engine
DIRS_device := tiers/device tiers/device/cpu
DIRS_cuda := cuda
DIRS_cudadriver := tiers/device/cuda
DIRS_host := tiers/host
DIRS_daemon := daemon
DIRS_front := daemon/front
DIRS_client := client/lib
DIRS_ctl := client/ctl
DIRS_worker := client/worker
DIRS_synthetic := client/worker/synthetic
DIRS_testsupport := tests/support

sources = $(foreach d,$(DIRS_$(1)),$(wildcard $(d)/*.c))
objects_of = $(patsubst %.c,$(B)/obj/%.o,$(filter-out %/main.c,$(call sources,$(1))))
# $(call archive,a b c): the archives of those modules that have a source yet.
archive = $(foreach m,$(1),$(if $(OBJECTS_$(m)),$(LIB)/internal/lib$(m).a))

# ------------------------------------------------------------------ generated: the protobuf schema

ifneq ($(wildcard proto/kvtier.proto),)
GENERATED_H := $(B)/proto/kvtier.pb-c.h
GENERATED_O := $(B)/obj/proto/kvtier.pb-c.o
endif

$(B)/proto/kvtier.pb-c.c $(B)/proto/kvtier.pb-c.h &: proto/kvtier.proto
	@mkdir -p $(B)/proto
	$(call say,PROTOC,$<)
	$(Q)protoc-c --c_out=$(B) $<

# ------------------------------------------------------------------ objects and archives

$(foreach m,$(MODULES),$(eval OBJECTS_$(m) := $(call objects_of,$(m))))
OBJECTS_proto += $(GENERATED_O)
OBJECTS_proto := $(strip $(OBJECTS_proto))

# `make V=1` shows the commands in full.
ifeq ($(V),1)
Q :=
say :=
else
Q := @
say = @printf '  %-7s %s\n' '$(1)' '$(2)'
endif

# Objects are rebuilt when compiler or flags change: their text is kept in a file.
FLAGS_FILE := $(B)/.flags
FLAGS_TEXT := $(CC) $(CPPFLAGS_ALL) $(CPPFLAGS) $(CFLAGS_ALL) $(CFLAGS) $(KERNEL_CFLAGS) $(OPENBLAS_CFLAGS)
$(FLAGS_FILE): FORCE
	@mkdir -p $(@D)
	@printf '%s\n' '$(subst ','\'',$(FLAGS_TEXT))' | cmp -s - $@ || \
	    printf '%s\n' '$(subst ','\'',$(FLAGS_TEXT))' >$@
.PHONY: FORCE
FORCE:

$(B)/obj/%.o: %.c $(FLAGS_FILE) | $(GENERATED_H)
	@mkdir -p $(@D)
	$(call say,CC,$<)
	$(Q)$(CC) $(CPPFLAGS_ALL) $(CPPFLAGS) $(CFLAGS_ALL) $(MODULE_CFLAGS) $(CFLAGS) -MMD -MP -c -o $@ $<

# The generated file is not ours to keep free of warnings.
$(GENERATED_O): $(B)/obj/proto/%.o: $(B)/proto/%.c $(FLAGS_FILE)
	@mkdir -p $(@D)
	$(call say,CC,$<)
	$(Q)$(CC) $(CPPFLAGS_ALL) $(CPPFLAGS) $(CFLAGS_ALL) -w $(CFLAGS) -MMD -MP -c -o $@ $<

# Kernels start no threads and share nothing but what they are given, so there is no race inside one;
# without ThreadSanitizer's eye on each load a model is ten times as fast.
$(OBJECTS_kernels): private MODULE_CFLAGS := $(KERNEL_CFLAGS) $(if $(filter tsan,$(VARIANT)),-fno-sanitize=thread)
$(B)/obj/client/worker/%.o: private MODULE_CFLAGS := $(KERNEL_CFLAGS) $(OPENBLAS_CFLAGS)
# Headers of the test framework have old-style prototypes.
$(B)/obj/tests/%.o: private MODULE_CFLAGS := -Wno-strict-prototypes $(OPENBLAS_CFLAGS)

define archive_rule
$(LIB)/internal/lib$(1).a: $$(OBJECTS_$(1))
	@mkdir -p $$(@D)
	$$(call say,AR,$$@)
	$$(Q)rm -f $$@ && $$(AR) rcs $$@ $$^
endef
$(foreach m,$(MODULES),$(if $(OBJECTS_$(m)),$(eval $(call archive_rule,$(m)))))

# ------------------------------------------------------------------ kernels for GPUs

# A .cu file becomes one image for the architectures named, and PTX for later ones, which is carried
# by the programs that launch it and loaded by the driver API. <name>_image is its first byte.
CUDA_ARCHITECTURES ?= 80 90
NVCC_ARCH := $(foreach a,$(CUDA_ARCHITECTURES),-gencode arch=compute_$(a),code=sm_$(a)) \
    -gencode arch=compute_$(lastword $(CUDA_ARCHITECTURES)),code=compute_$(lastword $(CUDA_ARCHITECTURES))
ifeq ($(WITH_CUDA),1)
CUDA_IMAGES := $(patsubst %.cu,$(B)/obj/%.fatbin.o,$(wildcard kernels/*.cu))
endif

$(B)/obj/%.fatbin: %.cu $(wildcard kernels/*.h) $(FLAGS_FILE)
	@mkdir -p $(@D)
	$(call say,NVCC,$<)
	$(Q)$(NVCC) -std=c++17 -I. -O3 -fatbin $(NVCC_ARCH) -o $@ $<

$(B)/obj/%.fatbin.o: $(B)/obj/%.fatbin
	$(call say,AS,$@)
	$(Q)printf '.section .rodata,"a"\n.balign 64\n.globl kvt_%s_image\n.hidden kvt_%s_image\nkvt_%s_image: .incbin "%s"\n.section .note.GNU-stack,"",@progbits\n' \
	    $(notdir $*) $(notdir $*) $(notdir $*) $< | $(CC) -c -x assembler -o $@ -

# ------------------------------------------------------------------ programs

# A program is <folder>/main.c, its own module first, and what else it may use.
PROGRAM_NAMES := kvtierd kvtierd-front kvtierctl kvtier-run kvtier-synth
MAIN_kvtierd := daemon/main.c
USES_kvtierd := daemon host device engine kernels proto
EXTERN_kvtierd := $(PROTOBUF_LIBS) $(XXHASH_LIBS) -ldl -lm
MAIN_kvtierd-front := daemon/front/main.c
USES_kvtierd-front := front proto
EXTERN_kvtierd-front := $(ZMQ_LIBS) $(PROTOBUF_LIBS)
MAIN_kvtierctl := client/ctl/main.c
USES_kvtierctl := ctl client cuda proto
EXTERN_kvtierctl := $(ZMQ_LIBS) $(PROTOBUF_LIBS) $(XXHASH_LIBS) -ldl -lm
MAIN_kvtier-run := client/worker/main.c
USES_kvtier-run := worker client cuda kernels proto
EXTERN_kvtier-run := $(ZMQ_LIBS) $(PROTOBUF_LIBS) $(XXHASH_LIBS) $(OPENBLAS_LIBS) -ldl -lm
MAIN_kvtier-synth := client/worker/synthetic/main.c
IMAGES_kvtier-synth := $(CUDA_IMAGES)
USES_kvtier-synth := synthetic client cuda kernels proto
EXTERN_kvtier-synth := $(ZMQ_LIBS) $(PROTOBUF_LIBS) $(XXHASH_LIBS) -ldl -lm

# $(call program,a b): those of the programs that have a main.c yet.
program = $(foreach p,$(1),$(if $(wildcard $(MAIN_$(p))),$(BIN)/$(p)))
PROGRAMS := $(call program,$(PROGRAM_NAMES))

# Archives may refer to one another in any order: hence the group.
link = $(CC) $(LDFLAGS_ALL) $(LDFLAGS) -o $@ $(1) -Wl,--start-group $(2) -Wl,--end-group $(3)

define program_rule
$(BIN)/$(1): $(B)/obj/$$(MAIN_$(1):.c=.o) $$(IMAGES_$(1)) $$(call archive,$$(USES_$(1))) | build/bin
	@mkdir -p $$(@D)
	$$(call say,LD,$$@)
	$$(Q)$$(call link,-pie $$(filter %.o,$$^),$$(filter %.a,$$^),$$(EXTERN_$(1)))
endef
$(foreach p,$(PROGRAM_NAMES),$(eval $(call program_rule,$(p))))

# build/bin is what people type: the release variant's programs.
build/bin:
	@mkdir -p build && ln -sfn release/bin build/bin

# ------------------------------------------------------------------ the cuda plug-in of the daemon

# A driver that kvtierd opens at run time: ../lib/kvtierd beside its program. It opens libcuda
# itself, so it links nothing of CUDA. Of our archives it takes what it uses, and offers one symbol.
ifeq ($(WITH_CUDA),1)
CUDA_PLUGIN := $(LIB)/kvtierd/kvtier-cuda.so
$(CUDA_PLUGIN): $(OBJECTS_cudadriver) $(OBJECTS_cuda) $(call archive,device host engine proto)
	@mkdir -p $(@D)
	$(call say,LD,$@)
	$(Q)$(call link,-shared -Wl$(comma)--exclude-libs$(comma)ALL $(if $(SANITIZE),,-Wl$(comma)-z$(comma)defs) $(filter %.o,$^),$(filter %.a,$^),$(PROTOBUF_LIBS) $(XXHASH_LIBS) -ldl)
endif

# ------------------------------------------------------------------ libkvtier, for everybody

# One relocatable object out of client/ and proto/, whose hidden names are made local: then the
# static library offers the public names only, just as the shared one does.
ifneq ($(OBJECTS_client),)
SO_NAME := libkvtier.so.$(SOVERSION)
SO_FILE := libkvtier.so.$(VERSION)
SO_MAP := $(wildcard client/lib/libkvtier.map)
LIBKVTIER_EXTERN := $(ZMQ_LIBS) $(PROTOBUF_LIBS) $(XXHASH_LIBS) -ldl
PUBLIC_LIBS := $(LIB)/libkvtier.so $(LIB)/libkvtier.a
endif

$(LIB)/$(SO_FILE): $(OBJECTS_client) $(OBJECTS_cuda) $(OBJECTS_proto) $(SO_MAP)
	@mkdir -p $(@D)
	$(call say,LD,$@)
	$(Q)$(CC) -shared $(LDFLAGS_ALL) $(LDFLAGS) -Wl,-soname,$(SO_NAME) \
	    $(if $(SO_MAP),-Wl$(comma)--version-script=$(SO_MAP)) $(if $(SANITIZE),,-Wl$(comma)-z$(comma)defs) \
	    -o $@ $(filter %.o,$^) $(LIBKVTIER_EXTERN)

$(LIB)/libkvtier.so: $(LIB)/$(SO_FILE)
	@ln -sfn $(SO_FILE) $(LIB)/$(SO_NAME) && ln -sfn $(SO_NAME) $@ && touch -h $@

$(LIB)/libkvtier.a: $(OBJECTS_client) $(OBJECTS_cuda) $(OBJECTS_proto)
	@mkdir -p $(@D)
	$(call say,AR,$@)
	$(Q)$(LD) -r -o $(LIB)/libkvtier.o $^
	$(Q)objcopy --localize-hidden $(LIB)/libkvtier.o
	$(Q)rm -f $@ && $(AR) rcs $@ $(LIB)/libkvtier.o && rm -f $(LIB)/libkvtier.o

# ------------------------------------------------------------------ examples

# Linked with the shared library, so that they prove that it exports what a worker needs.
EXAMPLE_SOURCES := $(wildcard examples/*.c)
ifneq ($(PUBLIC_LIBS),)
EXAMPLES := $(patsubst %.c,$(B)/%,$(EXAMPLE_SOURCES))
endif

$(B)/examples/%: $(B)/obj/examples/%.o $(LIB)/libkvtier.so
	@mkdir -p $(@D)
	$(call say,LD,$@)
	$(Q)$(CC) $(LDFLAGS_ALL) $(LDFLAGS) -pie -o $@ $< -L$(LIB) -lkvtier -Wl,-rpath,'$$ORIGIN/../lib'
# As a user's program, an example sees the public header and nothing else.
$(B)/obj/examples/%.o: examples/%.c $(FLAGS_FILE)
	@mkdir -p $(@D)
	$(call say,CC,$<)
	$(Q)$(CC) -Iclient -D_GNU_SOURCE= $(CPPFLAGS) $(CFLAGS_ALL) $(CFLAGS) -MMD -MP -c -o $@ $<
