/* Enough of Redis' protocol to send commands and to walk over replies. */
#include "common.h"

static UNUSED void resp_array(struct buffer *b, int n)
{
    buffer_format(b, "*%d\r\n", n);
}

static UNUSED void resp_string(struct buffer *b, const char *bytes, size_t n)
{
    buffer_format(b, "$%zu\r\n", n);
    buffer_add(b, bytes, n);
    buffer_add(b, "\r\n", 2);
}

static UNUSED void resp_text(struct buffer *b, const char *text)
{
    resp_string(b, text, strlen(text));
}

static UNUSED void resp_number(struct buffer *b, long long number)
{
    char digits[24];
    resp_string(b, digits, (size_t)snprintf(digits, sizeof digits, "%lld", number));
}

/* Walk over one whole reply at *at. 1: done, *at is behind it; 0: it is not all there yet. Errors are counted. */
static UNUSED int resp_skip(const char *data, size_t end, size_t *at, unsigned *errors)
{
    const char *line = data + *at, *line_end = memmem(line, end - *at, "\r\n", 2);
    if (!line_end) return 0;
    size_t next = (size_t)(line_end + 2 - data);
    long n = strtol(line + 1, NULL, 10);
    switch (*line) {
    case '-':
        if (!(*errors)++) fprintf(stderr, "redis: %.*s\n", (int)(line_end - line), line);
        break;
    case '$':
        if (n >= 0) next += (size_t)n + 2;
        if (next > end) return 0;
        break;
    case '*':
        for (long i = 0; i < n; i++)
            if (!resp_skip(data, end, &next, errors)) return 0;
    }
    *at = next;
    return 1;
}
