# make install DESTDIR=/some/root PREFIX=/usr
# Nothing outside DESTDIR is touched, and no service is started.

PREFIX ?= /usr/local
DESTDIR ?=
BINDIR ?= $(PREFIX)/bin
SBINDIR ?= $(PREFIX)/sbin
LIBDIR ?= $(PREFIX)/lib
INCLUDEDIR ?= $(PREFIX)/include
MANDIR ?= $(PREFIX)/share/man
UNITDIR ?= $(PREFIX)/lib/systemd/system
SYSUSERSDIR ?= $(PREFIX)/lib/sysusers.d
TMPFILESDIR ?= $(PREFIX)/lib/tmpfiles.d

# Where the daemon looks for its configuration, whatever PREFIX is.
SYSCONFDIR ?= /etc

INSTALL := install
DAEMON_PROGRAMS := $(filter %/kvtierd %/kvtierd-front,$(PROGRAMS))
USER_PROGRAMS := $(filter %/kvtierctl %/kvtier-run %/kvtier-synth,$(PROGRAMS))

.PHONY: install
install: all
	$(INSTALL) -d $(addprefix $(DESTDIR),$(BINDIR) $(SBINDIR) $(LIBDIR)/pkgconfig $(INCLUDEDIR))
	$(if $(DAEMON_PROGRAMS),$(INSTALL) -m 755 $(DAEMON_PROGRAMS) $(DESTDIR)$(SBINDIR))
	$(if $(USER_PROGRAMS),$(INSTALL) -m 755 $(USER_PROGRAMS) $(DESTDIR)$(BINDIR))
ifneq ($(CUDA_PLUGIN),)
	$(INSTALL) -D -m 755 $(CUDA_PLUGIN) $(DESTDIR)$(LIBDIR)/kvtierd/$(notdir $(CUDA_PLUGIN))
endif
ifneq ($(PUBLIC_LIBS),)
	$(INSTALL) -m 755 $(LIB)/$(SO_FILE) $(DESTDIR)$(LIBDIR)
	ln -sfn $(SO_FILE) $(DESTDIR)$(LIBDIR)/$(SO_NAME)
	ln -sfn $(SO_NAME) $(DESTDIR)$(LIBDIR)/libkvtier.so
	$(INSTALL) -m 644 $(LIB)/libkvtier.a $(DESTDIR)$(LIBDIR)
	$(INSTALL) -m 644 client/kvtier.h $(DESTDIR)$(INCLUDEDIR)
	sed -e 's|@PREFIX@|$(PREFIX)|' -e 's|@LIBDIR@|$(LIBDIR)|' -e 's|@INCLUDEDIR@|$(INCLUDEDIR)|' \
	    -e 's|@VERSION@|$(VERSION)|' mk/kvtier.pc.in >$(DESTDIR)$(LIBDIR)/pkgconfig/kvtier.pc
endif
	set -e; for page in $(wildcard man/*.[1-8]); do \
	    section=$${page##*.}; \
	    $(INSTALL) -D -m 644 $$page $(DESTDIR)$(MANDIR)/man$$section/$${page##*/}; done
	$(INSTALL) -d $(addprefix $(DESTDIR),$(UNITDIR) $(SYSUSERSDIR) $(TMPFILESDIR))
	sed 's|@SBINDIR@|$(SBINDIR)|' systemd/kvtierd.service >$(DESTDIR)$(UNITDIR)/kvtierd.service
	$(INSTALL) -m 644 systemd/kvtierd.sysusers $(DESTDIR)$(SYSUSERSDIR)/kvtierd.conf
	$(INSTALL) -m 644 systemd/kvtierd.tmpfiles $(DESTDIR)$(TMPFILESDIR)/kvtierd.conf
# The daemon knows every option with its prose and default. An administrator's file is kept: the
# new text then lies beside it.
ifneq ($(filter %/kvtierd,$(DAEMON_PROGRAMS)),)
	$(INSTALL) -d $(DESTDIR)$(SYSCONFDIR)/kvtierd
	set -e; file=$(DESTDIR)$(SYSCONFDIR)/kvtierd/kvtierd.conf; \
	    if test -e $$file; then file=$$file.new; fi; \
	    $(BIN)/kvtierd --print-config >$$file
endif
