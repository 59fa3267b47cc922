/* The floor: the least a relay can do. Subscribes to the channels that Rejoin's scripts push to, and copies each push
 * as server-sent events to the clients of its stream. It resumes nothing, fills no holes, knows no dialect but one.
 *
 *   floor PORT REDIS_PORT CHANNEL_PREFIX       GET /ID follows the generation ID */
#include "resp.h"

#define TABLE 65536 /* streams followed at most, a power of two */

struct client {
    int fd, is_waiting_for_head;
    struct buffer in, out;
    struct topic *topic;
    struct client *next;
};

struct topic {
    char *channel;
    int is_subscribed;
    struct client *clients;
};

static struct topic *topics[TABLE];
static int epoll, listener, redis;
static struct buffer to_redis, from_redis;
static const char *prefix;
static const char HEAD[] = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n";

static struct topic *topic_of(const char *channel, size_t n)
{
    uint32_t hash = 2166136261u;
    for (size_t i = 0; i < n; i++) hash = (hash ^ (uint8_t)channel[i]) * 16777619u;
    uint32_t at = hash & (TABLE - 1);
    while (topics[at] && (strncmp(topics[at]->channel, channel, n) || topics[at]->channel[n])) at = (at + 1) & (TABLE - 1);
    if (!topics[at]) {
        topics[at] = calloc(1, sizeof(struct topic));
        topics[at]->channel = strndup(channel, n);
    }
    return topics[at];
}

static void leave(struct client *c)
{
    for (struct client **at = c->topic ? &c->topic->clients : NULL; at && *at; at = &(*at)->next)
        if (*at == c) {
            *at = c->next;
            break;
        }
    close(c->fd);
    buffer_free(&c->in);
    buffer_free(&c->out);
    free(c);
}

static void write_to(struct client *c, const char *bytes, size_t n)
{
    if (c->out.at == c->out.end) { /* the usual case: straight to the socket */
        ssize_t taken = send(c->fd, bytes, n, MSG_NOSIGNAL);
        if (taken == (ssize_t)n) return;
        if (taken > 0) bytes += taken, n -= (size_t)taken;
    }
    buffer_add(&c->out, bytes, n);
    watch(epoll, EPOLL_CTL_MOD, c->fd, EPOLLIN | EPOLLOUT, c);
}

static void follow(struct client *c, const char *id, size_t n)
{
    char channel[512];
    size_t length = (size_t)snprintf(channel, sizeof channel, "%s%.*s", prefix, (int)n, id);
    struct topic *t = c->topic = topic_of(channel, length);
    c->next = t->clients;
    t->clients = c;
    if (t->is_subscribed) {
        write_to(c, HEAD, sizeof HEAD - 1);
        return;
    }
    c->is_waiting_for_head = 1;
    resp_array(&to_redis, 2);
    resp_text(&to_redis, "SUBSCRIBE");
    resp_string(&to_redis, channel, length);
    if (send_out(redis, &to_redis) < 0) die("redis");
}

static void hear_client(struct client *c)
{
    if (receive(c->fd, &c->in) != 1) {
        leave(c);
        return;
    }
    char *head = c->in.data + c->in.at;
    if (c->topic || !memmem(head, c->in.end - c->in.at, "\r\n\r\n", 4)) return;
    char *id = strchr(head, '/');
    if (!id) return;
    id++;
    follow(c, id, strcspn(id, " ?"));
    buffer_free(&c->in);
}

/* `id previous\nentry json\nentry json…`, as blocks of SSE in one chunk, made once for all its clients. */
static void push(struct topic *t, const char *payload, size_t n)
{
    static struct buffer body, chunk;
    const char *end = payload + n, *line = memchr(payload, '\n', n);
    body.at = body.end = chunk.at = chunk.end = 0;
    while (line && ++line < end) {
        const char *next = memchr(line, '\n', (size_t)(end - line)), *line_end = next ? next : end;
        const char *json = memchr(line, ' ', (size_t)(line_end - line)), *type = json + 10; /* behind {"type":" */
        const char *type_end = memchr(type, '"', (size_t)(line_end - type));
        buffer_add(&body, "id: ", 4), buffer_add(&body, line, (size_t)(json - line));
        buffer_add(&body, "\nevent: ", 8), buffer_add(&body, type, (size_t)(type_end - type));
        buffer_add(&body, "\ndata: ", 7), buffer_add(&body, json + 1, (size_t)(line_end - json - 1));
        buffer_add(&body, "\n\n", 2);
        line = next;
    }
    buffer_format(&chunk, "%zx\r\n", body.end);
    buffer_add(&chunk, body.data, body.end);
    buffer_add(&chunk, "\r\n", 2);
    for (struct client *c = t->clients, *next; c; c = next) {
        next = c->next;
        write_to(c, chunk.data, chunk.end);
    }
}

static void subscribed(struct topic *t)
{
    t->is_subscribed = 1;
    for (struct client *c = t->clients; c; c = c->next)
        if (c->is_waiting_for_head) {
            c->is_waiting_for_head = 0;
            write_to(c, HEAD, sizeof HEAD - 1);
        }
}

/* The bulk string at `at`: its start and size; answers what follows it. */
static size_t bulk(const char *data, size_t at, const char **start, size_t *size)
{
    *size = strtoul(data + at + 1, NULL, 10);
    *start = strchr(data + at, '\n') + 1;
    return (size_t)(*start - data) + *size + 2;
}

static void hear_redis(void)
{
    struct buffer *b = &from_redis;
    unsigned errors = 0;
    if (receive(redis, b) != 1) die("redis has gone");
    for (size_t end = b->at; b->at < b->end && resp_skip(b->data, b->end, &end, &errors); b->at = end) {
        const char *kind, *channel, *payload;
        size_t kind_size, channel_size, size;
        size_t at = bulk(b->data, b->at + 4, &kind, &kind_size); /* behind *3\r\n */
        at = bulk(b->data, at, &channel, &channel_size);
        struct topic *t = topic_of(channel, channel_size);
        if (*kind == 's') {
            subscribed(t);
        } else if (*kind == 'm') {
            bulk(b->data, at, &payload, &size);
            push(t, payload, size);
        }
    }
}

static void welcome(void)
{
    int fd;
    while ((fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC)) >= 0) {
        struct client *c = calloc(1, sizeof *c);
        no_delay(fd);
        c->fd = fd;
        watch(epoll, EPOLL_CTL_ADD, fd, EPOLLIN, c);
    }
}

int main(int argc, char **argv)
{
    struct epoll_event found[256];
    if (argc != 4) die("floor: port, redis' port, channel prefix");
    signal(SIGPIPE, SIG_IGN);
    prefix = argv[3];
    epoll = epoll_create1(EPOLL_CLOEXEC);
    listener = listen_on(atoi(argv[1]));
    redis = dial(atoi(argv[2]));
    struct pollfd connected = {.fd = redis, .events = POLLOUT};
    if (redis < 0 || poll(&connected, 1, 5000) != 1) die("redis");
    watch(epoll, EPOLL_CTL_ADD, listener, EPOLLIN, &listener);
    watch(epoll, EPOLL_CTL_ADD, redis, EPOLLIN, &redis);
    for (;;) {
        int n = epoll_wait(epoll, found, 256, -1);
        for (int i = 0; i < n; i++) {
            struct client *c = found[i].data.ptr;
            if ((void *)c == &listener) welcome();
            else if ((void *)c == &redis) hear_redis();
            else if (found[i].events & (EPOLLIN | EPOLLHUP | EPOLLERR)) hear_client(c);
            else if (send_out(c->fd, &c->out) == 1) watch(epoll, EPOLL_CTL_MOD, c->fd, EPOLLIN, c);
        }
    }
}
