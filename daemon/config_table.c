/* The table of options, and what follows from one entry alone: accepted range, storing a value,
 * printing. A new option is a new entry here and a field in config.h.
 */
#include "daemon/config.h"
#include "daemon/units.h"

#include <inttypes.h>
#include <stdbool.h>
#include <string.h>

#define AT(field)        offsetof(struct kvt_config, field)
#define AT_DEVICE(field) offsetof(struct kvt_config_device, field)
#define KIB(n)           ((uint64_t)(n) << 10)
#define MIB(n)           ((uint64_t)(n) << 20)
#define GIB(n)           ((uint64_t)(n) << 30)
#define TIB(n)           ((uint64_t)(n) << 40)
#define MS(n)            ((uint64_t)(n)*1000)
#define S(n)             ((uint64_t)(n)*1000000)

const char *const kvt_section_names[KVT_SECTIONS] = {"daemon", "host", "device NAME"};
const char *const kvt_section_prose[KVT_SECTIONS] = {
    "The service itself.",
    "Host memory: the authoritative copy of everything that is streamed, for all devices.",
    ("A device that workers compute on; one section for each. NAME has letters, digits, - and _. "
     "Without any such section there is one device, cpu0, with the defaults below."),
};

const struct kvt_option kvt_options[] = {
    {.section = KVT_SECTION_DAEMON,
     .name = "runtime_dir",
     .type = KVT_OPTION_PATH,
     .offset = AT(runtime_dir),
     .min = 1,
     .max = KVT_CONFIG_TEXT_BYTES - 1,
     .value = "/run/kvtierd",
     .prose = "Directory of the sockets and the lock file; made with mode 0750 if it is not there. "
              "The paths of its sockets may have 107 bytes, so it is short."},
    {.section = KVT_SECTION_DAEMON,
     .name = "log_level",
     .type = KVT_OPTION_CHOICE,
     .offset = AT(log_level),
     .value = "info",
     .choices = "error|warning|info|debug",
     .prose = "How much is written to standard error."},
    {.section = KVT_SECTION_DAEMON,
     .name = "sessions_max",
     .type = KVT_OPTION_COUNT,
     .offset = AT(sessions_max),
     .min = 1,
     .max = 4096,
     .value = "128",
     .prose = "Workers attached at one time, those that are dead but still pin memory included. "
              "Each needs about 4 file descriptors."},
    {.section = KVT_SECTION_DAEMON,
     .name = "caches_max",
     .type = KVT_OPTION_COUNT,
     .offset = AT(caches_max),
     .min = 1,
     .max = 65536,
     .value = "1024",
     .prose = "Caches of all workers together."},
    {.section = KVT_SECTION_DAEMON,
     .name = "block_tokens",
     .type = KVT_OPTION_POWER_OF_2,
     .offset = AT(block_tokens),
     .min = KVT_BLOCK_TOKENS_MIN,
     .max = KVT_BLOCK_TOKENS_MAX,
     .value = "256",
     .prose = "Tokens of a block, the unit of sharing and accounting."},
    {.section = KVT_SECTION_DAEMON,
     .name = "idle_after",
     .type = KVT_OPTION_DURATION,
     .offset = AT(idle_after_us),
     .min = MS(10),
     .max = S(86400),
     .value = "5s",
     .prose = "A worker without an open step for so long is idle: others may take its device "
              "memory."},
    {.section = KVT_SECTION_DAEMON,
     .name = "reclaim_deadline",
     .type = KVT_OPTION_DURATION,
     .offset = AT(reclaim_deadline_us),
     .min = MS(10),
     .max = S(600),
     .value = "2s",
     .prose = "How long a request waits for another worker to give back device memory that it was "
              "asked for."},
    {.section = KVT_SECTION_DAEMON,
     .name = "stop_timeout",
     .type = KVT_OPTION_DURATION,
     .offset = AT(stop_timeout_us),
     .min = MS(10),
     .max = S(600),
     .value = "5s",
     .prose = "How long a clean stop waits for copies that are under way."},
    {.section = KVT_SECTION_DAEMON,
     .name = "ring_size",
     .type = KVT_OPTION_SIZE,
     .offset = AT(ring_bytes),
     .min = KIB(64),
     .max = GIB(1),
     .value = "8MiB",
     .prose = "Schedule ring of each worker: bounds the pieces of the steps that it may have "
              "scheduled ahead. Memory is used as far as schedules need it."},
    {.section = KVT_SECTION_DAEMON,
     .name = "admin_group",
     .type = KVT_OPTION_TEXT,
     .offset = AT(admin_group),
     .max = 64,
     .value = "",
     .prose = "Group whose members see and evict the workers of all users, as root and the "
              "daemon's own user do. Empty: none."},
    {.section = KVT_SECTION_DAEMON,
     .name = "socket_group",
     .type = KVT_OPTION_TEXT,
     .offset = AT(socket_group),
     .max = 64,
     .value = "",
     .prose = "Group that may attach: owns the runtime directory and the sockets. Empty: the "
              "daemon's own group."},
    {.section = KVT_SECTION_DAEMON,
     .name = "front_program",
     .type = KVT_OPTION_PATH,
     .offset = AT(front_program),
     .max = KVT_CONFIG_TEXT_BYTES - 1,
     .value = "",
     .prose = "The process that serves the ZeroMQ socket. Empty: kvtierd-front beside kvtierd."},
    {.section = KVT_SECTION_DAEMON,
     .name = "front_memory",
     .type = KVT_OPTION_SIZE,
     .offset = AT(front_memory_bytes),
     .min = MIB(16),
     .max = GIB(64),
     .value = "256MiB",
     .prose = "Memory of kvtierd-front. If a peer makes it use more, it ends and is started again; "
              "workers notice a delay."},
    {.section = KVT_SECTION_DAEMON,
     .name = "plugin_dir",
     .type = KVT_OPTION_PATH,
     .offset = AT(plugin_dir),
     .max = KVT_CONFIG_TEXT_BYTES - 1,
     .value = "",
     .prose = "Where device drivers other than cpu are looked for. Empty: ../lib/kvtierd beside "
              "the folder of kvtierd."},
    {.section = KVT_SECTION_HOST,
     .name = "budget",
     .type = KVT_OPTION_SIZE,
     .offset = AT(host_budget_bytes),
     .min = KIB(64),
     .max = TIB(64),
     .value = "1GiB",
     .prose = "Host memory for caches, never exceeded."},
    {.section = KVT_SECTION_HOST,
     .name = "worker_max",
     .type = KVT_OPTION_SIZE_AUTO,
     .offset = AT(host_worker_max_bytes),
     .min = KIB(64),
     .max = TIB(64),
     .value = "auto",
     .prose = "Host memory that one worker may hold, so that it leaves some to the others. Not "
              "larger than the budget. auto: all of it."},
    {.section = KVT_SECTION_HOST,
     .name = "preallocate",
     .type = KVT_OPTION_SIZE_NONE,
     .offset = AT(host_preallocate_bytes),
     .min = KIB(64),
     .max = TIB(64),
     .value = "auto",
     .prose = "Of the budget, what is taken from the system at start and kept, while the daemon "
              "answers already; the rest comes when caches need it. Not larger than the budget. "
              "auto: all of it where a device pins host memory (cuda), otherwise none."},
    {.section = KVT_SECTION_HOST,
     .name = "chunk",
     .type = KVT_OPTION_SIZE,
     .offset = AT(host_chunk_bytes),
     .min = KIB(64),
     .max = GIB(4),
     .value = "16MiB",
     .prose = "Host memory is taken from the system and given back in pieces of this size. It is a "
              "multiple of 64KiB and not larger than the budget; the default is lowered to a "
              "smaller one."},
    {.section = KVT_SECTION_HOST,
     .name = "touch_threads",
     .type = KVT_OPTION_COUNT_AUTO,
     .offset = AT(host_touch_threads),
     .min = 1,
     .max = 64,
     .value = "auto",
     .prose = "Threads that touch new host memory for the first time and register it with devices. "
              "auto: half of the CPUs, between 2 and 8."},
    {.section = KVT_SECTION_DEVICE,
     .name = "driver",
     .type = KVT_OPTION_CHOICE,
     .offset = AT_DEVICE(driver),
     .value = "cpu",
     .choices = "cpu|cuda",
     .prose =
         "cpu: device memory is a memfd and copy threads stand for DMA; needs no hardware. cuda: a "
         "GPU, by the plug-in kvtier-cuda.so and an NVIDIA driver."},
    {.section = KVT_SECTION_DEVICE,
     .name = "uuid",
     .type = KVT_OPTION_UUID,
     .offset = AT_DEVICE(uuid),
     .max = 36,
     .value = "",
     .prose = "Identity by which workers name the device, 32 hexadecimal digits. cuda: the GPU to "
              "use. Empty: the driver's first, or one made from NAME (cpu)."},
    {.section = KVT_SECTION_DEVICE,
     .name = "budget",
     .type = KVT_OPTION_SIZE,
     .offset = AT_DEVICE(budget_bytes),
     .min = KIB(64),
     .max = TIB(64),
     .value = "256MiB",
     .prose = "Device memory for caches, never exceeded; memory that dead or stopped workers still "
              "pin is counted."},
    {.section = KVT_SECTION_DEVICE,
     .name = "worker_max",
     .type = KVT_OPTION_SIZE_AUTO,
     .offset = AT_DEVICE(worker_max_bytes),
     .min = KIB(64),
     .max = TIB(64),
     .value = "auto",
     .prose =
         "Device memory that one worker may hold, so that it leaves some to the others. Beyond "
         "it only its own layers give way. Not larger than the budget. auto: all of it."},
    {.section = KVT_SECTION_DEVICE,
     .name = "extent_size",
     .type = KVT_OPTION_SIZE_AUTO,
     .offset = AT_DEVICE(extent_bytes),
     .min = KIB(4),
     .max = GIB(4),
     .value = "auto",
     .prose = "Small things are packed into extents of this size, the unit that is shared with a "
              "worker. Not larger than the budget. auto: a sixteenth of the budget, between 64KiB "
              "and 32MiB."},
    {.section = KVT_SECTION_DEVICE,
     .name = "piece_size",
     .type = KVT_OPTION_SIZE_AUTO,
     .offset = AT_DEVICE(piece_bytes),
     .min = KIB(4),
     .max = GIB(4),
     .value = "auto",
     .prose = "Bytes of a piece that is streamed to a segment worker, if the worker does not say. "
              "Not larger than the budget. auto: a sixteenth of the budget, between 64KiB and "
              "32MiB."},
    {.section = KVT_SECTION_DEVICE,
     .name = "cut_size",
     .type = KVT_OPTION_SIZE,
     .offset = AT_DEVICE(cut_bytes),
     .min = KIB(4),
     .max = GIB(1),
     .value = "16MiB",
     .prose = "Copies are cut to at most this size, so that workers take turns."},
    {.section = KVT_SECTION_DEVICE,
     .name = "quantum",
     .type = KVT_OPTION_SIZE,
     .offset = AT_DEVICE(quantum_bytes),
     .min = KIB(4),
     .max = GIB(1),
     .value = "16MiB",
     .prose = "Bytes that a worker may copy before it is the next one's turn."},
    {.section = KVT_SECTION_DEVICE,
     .name = "inflight_size",
     .type = KVT_OPTION_SIZE,
     .offset = AT_DEVICE(inflight_bytes),
     .min = KIB(4),
     .max = GIB(4),
     .value = "256MiB",
     .prose =
         "Copies that are under way at one time, in bytes, and at most 256 of them. More keeps the "
         "link busy; less lets another worker's turn come sooner. Prompts and migrations have a "
         "quarter of it while another worker decodes."},
    {.section = KVT_SECTION_DEVICE,
     .name = "copy_threads",
     .type = KVT_OPTION_COUNT,
     .offset = AT_DEVICE(copy_threads),
     .min = 1,
     .max = 64,
     .value = "2",
     .prose = "cpu: threads that copy."},
    {.section = KVT_SECTION_DEVICE,
     .name = "spin",
     .type = KVT_OPTION_DURATION,
     .offset = AT_DEVICE(spin_us),
     .min = 0,
     .max = S(1),
     .value = "20us",
     .prose = "How long the device's thread looks again for a worker's progress before it sleeps."},
    {.section = KVT_SECTION_DEVICE,
     .name = "extent_kind",
     .type = KVT_OPTION_CHOICE,
     .offset = AT_DEVICE(extent_kind),
     .value = "auto",
     .choices = "auto|fd|ipc",
     .prose = "How device memory is shared with workers: file descriptors, CUDA IPC handles, or "
              "the driver's first choice."},
};
const uint32_t kvt_option_count = sizeof(kvt_options) / sizeof(kvt_options[0]);

/* The number of `value` among "a|b|c"; -1: none of them. */
static int choice_index(const char *choices, const char *value) {
    size_t length = strlen(value);
    int index = 0;
    for (const char *p = choices; *p != '\0'; index++) {
        size_t n = strcspn(p, "|");
        if (n == length && memcmp(p, value, n) == 0) {
            return index;
        }
        p += n + (p[n] == '|');
    }
    return -1;
}

const char *kvt_config_driver_name(const struct kvt_config_device *d) {
    return d->driver == 0 ? "cpu" : "cuda";
}

const char *kvt_option_accepted(const struct kvt_option *o, char *text, size_t size) {
    char low[KVT_UNIT_TEXT_BYTES];
    char high[KVT_UNIT_TEXT_BYTES];
    switch (o->type) {
    case KVT_OPTION_SIZE:
    case KVT_OPTION_SIZE_AUTO:
    case KVT_OPTION_SIZE_NONE:
        (void)snprintf(text, size, "%s%s to %s, with a unit: B, KiB, MiB, GiB, TiB",
                       o->type == KVT_OPTION_SIZE_AUTO   ? "auto, or "
                       : o->type == KVT_OPTION_SIZE_NONE ? "auto, none, or "
                                                         : "",
                       kvt_size_exact(o->min, low), kvt_size_exact(o->max, high));
        break;
    case KVT_OPTION_DURATION:
        (void)snprintf(text, size, "%s to %s, with a unit: us, ms, s, min, h",
                       kvt_duration_exact(o->min, low), kvt_duration_exact(o->max, high));
        break;
    case KVT_OPTION_COUNT:
    case KVT_OPTION_COUNT_AUTO:
    case KVT_OPTION_POWER_OF_2:
        (void)snprintf(text, size, "%s%" PRIu64 " to %" PRIu64 "%s",
                       o->type == KVT_OPTION_COUNT_AUTO ? "auto, or " : "", o->min, o->max,
                       o->type == KVT_OPTION_POWER_OF_2 ? ", a power of 2" : "");
        break;
    case KVT_OPTION_TEXT:
        (void)snprintf(text, size, "%" PRIu64 " to %" PRIu64 " bytes", o->min, o->max);
        break;
    case KVT_OPTION_PATH:
        (void)snprintf(text, size, "%san absolute path of at most %" PRIu64 " bytes",
                       o->min == 0 ? "empty, or " : "", o->max);
        break;
    case KVT_OPTION_CHOICE: {
        size_t used = 0;
        for (const char *p = o->choices; *p != '\0' && used + 1 < size; p++) {
            int n = snprintf(text + used, size - used, "%s", *p == '|' ? ", " : (char[]){*p, 0});
            used += n > 0 ? (size_t)n : 0;
        }
        break;
    }
    case KVT_OPTION_UUID:
        (void)snprintf(text, size, "empty, or 32 hexadecimal digits; dashes are ignored");
        break;
    }
    return text;
}

static bool is_count(const struct kvt_option *o) {
    return o->type == KVT_OPTION_COUNT || o->type == KVT_OPTION_COUNT_AUTO ||
           o->type == KVT_OPTION_POWER_OF_2;
}

static const char *store_number(const struct kvt_option *o, void *at, const char *value) {
    uint64_t number = 0;
    const char *wrong = o->type == KVT_OPTION_DURATION ? kvt_duration_parse(value, &number)
                        : is_count(o)                  ? kvt_count_parse(value, &number)
                                                       : kvt_size_parse(value, &number);
    if (wrong != NULL) {
        return wrong;
    }
    if (number < o->min || number > o->max) {
        return "is outside the accepted range";
    }
    if (o->type == KVT_OPTION_POWER_OF_2 && (number & (number - 1)) != 0) {
        return "is not a power of 2";
    }
    if (is_count(o)) {
        *(uint32_t *)at = (uint32_t)number;
    } else {
        *(uint64_t *)at = number;
    }
    return NULL;
}

static const char *store_text(const struct kvt_option *o, char *at, const char *value) {
    size_t length = strlen(value);
    if (length < o->min) {
        return "is empty";
    }
    if (length > o->max) {
        return "is too long";
    }
    if (o->type == KVT_OPTION_PATH && length > 0 && value[0] != '/') {
        return "is not an absolute path";
    }
    memcpy(at, value, length + 1);
    return NULL;
}

const char *kvt_option_store(const struct kvt_option *o, void *base, const char *value) {
    void *at = (char *)base + o->offset;
    switch (o->type) {
    case KVT_OPTION_SIZE_AUTO:
    case KVT_OPTION_SIZE_NONE:
        if (strcmp(value, "auto") == 0) {
            *(uint64_t *)at = 0;
            return NULL;
        }
        if (o->type == KVT_OPTION_SIZE_NONE && strcmp(value, "none") == 0) {
            *(uint64_t *)at = KVT_SIZE_NONE;
            return NULL;
        }
        return store_number(o, at, value);
    case KVT_OPTION_COUNT_AUTO:
        if (strcmp(value, "auto") == 0) {
            *(uint32_t *)at = 0;
            return NULL;
        }
        return store_number(o, at, value);
    case KVT_OPTION_SIZE:
    case KVT_OPTION_DURATION:
    case KVT_OPTION_COUNT:
    case KVT_OPTION_POWER_OF_2:
        return store_number(o, at, value);
    case KVT_OPTION_TEXT:
    case KVT_OPTION_PATH:
        return store_text(o, at, value);
    case KVT_OPTION_UUID:
        if (value[0] == '\0') {
            memset(at, 0, KVT_UUID_BYTES);
            return NULL;
        }
        return kvt_uuid_parse(value, at);
    case KVT_OPTION_CHOICE: {
        int index = choice_index(o->choices, value);
        if (index < 0) {
            return "is not one of the choices";
        }
        *(uint32_t *)at = (uint32_t)index;
        return NULL;
    }
    }
    return "has an unknown type";
}

#define PROSE_COLUMNS 96

static void print_prose(FILE *stream, const char *prose) {
    size_t column = 0;
    for (const char *p = prose; *p != '\0';) {
        size_t word = strcspn(p, " ");
        if (column > 0 && column + 1 + word > PROSE_COLUMNS) {
            (void)fputc('\n', stream);
            column = 0;
        }
        (void)fprintf(stream, "%s%.*s", column == 0 ? "# " : " ", (int)word, p);
        column += 1 + word;
        p += word;
        p += strspn(p, " ");
    }
    (void)fputc('\n', stream);
}

void kvt_config_print(FILE *stream) {
    char accepted[KVT_CONFIG_TEXT_BYTES];
    (void)fprintf(stream, "# kvtierd.conf: every option, at its default. See kvtierd.conf(5).\n");
    for (int section = 0; section < KVT_SECTIONS; section++) {
        (void)fputc('\n', stream);
        print_prose(stream, kvt_section_prose[section]);
        (void)fprintf(stream, "[%s]\n",
                      section == KVT_SECTION_DEVICE ? "device cpu0" : kvt_section_names[section]);
        for (uint32_t i = 0; i < kvt_option_count; i++) {
            const struct kvt_option *o = &kvt_options[i];
            if ((int)o->section != section) {
                continue;
            }
            (void)fputc('\n', stream);
            print_prose(stream, o->prose);
            (void)fprintf(stream, "# Accepted: %s.\n",
                          kvt_option_accepted(o, accepted, sizeof(accepted)));
            (void)fprintf(stream, "%s =%s%s\n", o->name, o->value[0] == '\0' ? "" : " ", o->value);
        }
    }
}
