/* See chat.h. */
#include "client/worker/chat.h"

#include <string.h>

#include "client/worker/fail.h"
#include "proto/errors.h"

struct form {
    const char *mark; /* found in the template: it is of this form */
    const char *head, *head_end, *turn_end;
    bool bos;
};

static const struct form forms[] = {
    {"<|im_start|>", "<|im_start|>", "\n", "<|im_end|>\n", false},
    {"<|start_header_id|>", "<|start_header_id|>", "<|end_header_id|>\n\n", "<|eot_id|>", true},
};

static const char *find(const char *text, size_t size, const char *part) {
    return memmem(text, size, part, strlen(part));
}

/* The system text that a ChatML template writes when the conversation brings none. */
static struct kvt_gguf_string default_system(const struct kvt_gguf_string *template) {
    static const char *const heads[] = {"!= 'system' %}{{ '<|im_start|>system\n",
                                        "!= 'system' %}{{ '<|im_start|>system\\n"};
    struct kvt_gguf_string none = {NULL, 0};
    for (size_t i = 0; i < sizeof(heads) / sizeof(heads[0]); i++) {
        const char *start = find(template->data, template->size, heads[i]);
        if (!start)
            continue;
        start += strlen(heads[i]);
        const char *end =
            find(start, template->size - (size_t)(start - template->data), "<|im_end|>");
        if (end)
            return (struct kvt_gguf_string){start, (size_t)(end - start)};
    }
    return none;
}

static int add_turn(const struct kvt_tokenizer *t, const struct form *form, const char *role,
                    const char *text, size_t size, bool open, struct kvt_ids *ids) {
    /* marks and role in one stretch, the text in its own: it may not speak for the template */
    char head[64];
    int length = snprintf(head, sizeof(head), "%s%s%s", form->head, role, form->head_end);
    int rc = kvt_tokenizer_encode(t, head, (size_t)length, true, ids);
    if (rc == 0 && !open)
        rc = kvt_tokenizer_encode(t, text, size, false, ids);
    if (rc == 0 && !open)
        rc = kvt_tokenizer_encode(t, form->turn_end, strlen(form->turn_end), true, ids);
    return rc;
}

int kvt_chat_encode(const struct kvt_gguf *gguf, const struct kvt_tokenizer *tokenizer,
                    const char *system, const char *user, struct kvt_ids *ids, char *err,
                    size_t err_size) {
    struct kvt_gguf_string template;
    const struct form *form = NULL;
    if (kvt_gguf_text(gguf, "tokenizer.chat_template", &template))
        return kvt_fail(-KVT_ENOTSUP, err, err_size,
                        "%s: carries no chat template; leave out --chat to go on from plain text",
                        kvt_gguf_name(gguf));
    for (size_t i = 0; i < sizeof(forms) / sizeof(forms[0]) && !form; i++)
        if (find(template.data, template.size, forms[i].mark))
            form = &forms[i];
    if (!form)
        return kvt_fail(-KVT_ENOTSUP, err, err_size,
                        "%s: its chat template is neither ChatML nor Llama 3's; leave out --chat "
                        "and write the model's marks into the prompt with --special",
                        kvt_gguf_name(gguf));

    int rc = 0;
    struct kvt_gguf_string first = default_system(&template);
    if (system)
        first = (struct kvt_gguf_string){system, strlen(system)};
    if (form->bos && kvt_tokenizer_bos(tokenizer) != KVT_TOKEN_NONE)
        rc = kvt_ids_add(ids, kvt_tokenizer_bos(tokenizer));
    if (rc == 0 && first.data)
        rc = add_turn(tokenizer, form, "system", first.data, first.size, false, ids);
    if (rc == 0)
        rc = add_turn(tokenizer, form, "user", user, strlen(user), false, ids);
    if (rc == 0)
        rc = add_turn(tokenizer, form, "assistant", NULL, 0, true, ids);
    return rc ? kvt_fail(rc, err, err_size, "the prompt: %s", kvt_error_text(rc)) : 0;
}
