/* Many clients of event streams at once: opens them, reads them, checks that every event came once and in order.
 *
 *   load [--seconds S] [--skip N] [--flight N] [--hold] [--whole] [--header H]... FILE
 *
 * Each line of FILE is one client, its fields parted by tabs: port, stream, number of the first event it is to get, number
 * behind the last one, method, path, body.
 * Says `ready` once every client has its answer's head (and, with --hold, waits until its input is closed). Ends when
 * all clients have what they expect, or after S seconds, and prints what it found as one line of JSON.
 *   --skip N     leave the first N events of each stream out of the times
 *   --whole      `ready` only when every client has all that it expects
 *   --flight N   at most N clients wait for their answer's head at once: 1 lets one begin when the one before is done
 */
#include "common.h"

enum state { WAITING, CONNECTING, HEAD, BODY, DONE };

struct client {
    int fd, port;
    enum state state;
    uint32_t stream, first, end, came, newest; /* newest: the highest number that came, plus one */
    char *method, *path, *body;
    uint64_t asked_at, stamped_at;
    uint8_t *seen;
    int chunked;
    long chunk_left; /* of this chunk; -2: its size is still to come; -1: the line break after it */
    struct buffer raw, events;
};

static struct client *clients;
static int total, begun, waiting, answered, finished, epoll, flight = 1000, hold, whole, full, said_ready;
static unsigned skip;
static uint64_t lost, doubled, reordered, foreign, refused, broken, turned_away, events_came;
static struct times latency, head_times, first_times, whole_times;
static char headers[4096];

static uint32_t expected_of(const struct client *c) { return c->end - c->first; }

static void begin(struct client *c)
{
    c->asked_at = now_ns();
    c->fd = dial(c->port);
    c->state = CONNECTING;
    c->chunk_left = -2;
    waiting++;
    if (c->fd < 0) die("connect");
    watch(epoll, EPOLL_CTL_ADD, c->fd, EPOLLOUT, c);
}

static void finish(struct client *c)
{
    if (c->state == DONE) return;
    if (c->state == CONNECTING || c->state == HEAD) waiting--;
    if (c->fd >= 0) close(c->fd);
    c->fd = -1;
    c->state = DONE;
    buffer_free(&c->raw);
    buffer_free(&c->events);
    finished++;
}

static void ask(struct client *c)
{
    struct buffer request = {0};
    size_t size = strlen(c->body);
    buffer_room(&request, size + strlen(c->path) + sizeof headers + 512);
    buffer_format(&request, "%s ", c->method);
    buffer_add(&request, c->path, strlen(c->path));
    buffer_format(&request, " HTTP/1.1\r\nHost: 127.0.0.1:%d\r\nAccept: text/event-stream\r\n", c->port);
    buffer_add(&request, headers, strlen(headers));
    if (size) buffer_format(&request, "Content-Type: application/json\r\nContent-Length: %zu\r\n", size);
    buffer_add(&request, "\r\n", 2);
    buffer_add(&request, c->body, size);
    if (send_out(c->fd, &request) != 1) { /* a fresh socket takes a whole request */
        broken++;
        finish(c);
    } else {
        c->state = HEAD;
        watch(epoll, EPOLL_CTL_MOD, c->fd, EPOLLIN, c);
    }
    buffer_free(&request);
}

/* One event of this client's stream: is it the next one? */
static void count_event(struct client *c, uint64_t sent_at, uint32_t stream, uint32_t seq, uint64_t now)
{
    if (stream != c->stream || seq < c->first || seq >= c->end) {
        foreign++;
        return;
    }
    uint8_t bit = (uint8_t)(1 << (seq & 7));
    if (c->seen[seq >> 3] & bit) {
        doubled++;
        return;
    }
    c->seen[seq >> 3] |= bit;
    if (seq < c->newest) reordered++;
    else c->newest = seq + 1;
    if (c->came++ == 0) times_add(&first_times, now - c->asked_at);
    full += c->came == expected_of(c);
    events_came++;
    if (seq >= skip && now > sent_at) times_add(&latency, now - sent_at);
}

static void read_line(struct client *c, const char *line, const char *end, uint64_t now)
{
    if (end - line < 5 || memcmp(line, "data:", 5)) return;
    for (const char *at = line; (at = memchr(at, '@', (size_t)(end - at)));) {
        char *next;
        uint64_t sent_at = strtoull(at + 1, &next, 10);
        if (*next == ':') {
            uint32_t stream = (uint32_t)strtoul(next + 1, &next, 10);
            if (*next == ':') {
                uint32_t seq = (uint32_t)strtoul(next + 1, &next, 10);
                if (*next == '@') {
                    count_event(c, sent_at, stream, seq, now);
                    at = next + 1;
                    continue;
                }
            }
        }
        at++;
    }
}

/* An event counts when its blank line has come, as the HTML Standard says. */
static void read_events(struct client *c, uint64_t now)
{
    struct buffer *b = &c->events;
    char *end;
    while ((end = memmem(b->data + b->at, b->end - b->at, "\n\n", 2))) {
        char *line = b->data + b->at;
        while (line < end) {
            char *line_end = memchr(line, '\n', (size_t)(end - line));
            if (!line_end) line_end = end;
            read_line(c, line, line_end, now);
            line = line_end + 1;
        }
        b->at = (size_t)(end + 2 - b->data);
    }
}

static void add_body(struct client *c, const char *bytes, size_t n)
{
    buffer_room(&c->events, n + 1);
    char *to = c->events.data + c->events.end;
    const char *from = bytes;
    for (const char *cr; (cr = memchr(from, '\r', (size_t)(bytes + n - from))); from = cr + 1) {
        memcpy(to, from, (size_t)(cr - from)); /* CR LF is one line break, like LF */
        to += cr - from;
    }
    memcpy(to, from, (size_t)(bytes + n - from));
    c->events.end = (size_t)(to + (bytes + n - from) - c->events.data);
}

/* The body out of its chunks. True when its end has come. */
static int read_body(struct client *c)
{
    struct buffer *b = &c->raw;
    if (!c->chunked) {
        add_body(c, b->data + b->at, b->end - b->at);
        b->at = b->end;
        return 0;
    }
    while (b->at < b->end) {
        if (c->chunk_left > 0) {
            size_t n = b->end - b->at < (size_t)c->chunk_left ? b->end - b->at : (size_t)c->chunk_left;
            add_body(c, b->data + b->at, n);
            b->at += n;
            c->chunk_left -= (long)n;
            if (c->chunk_left == 0) c->chunk_left = -1;
            continue;
        }
        char *end = memmem(b->data + b->at, b->end - b->at, "\r\n", 2);
        if (!end) return 0;
        if (c->chunk_left == -1) c->chunk_left = -2;
        else if ((c->chunk_left = strtol(b->data + b->at, NULL, 16)) == 0) return 1;
        b->at = (size_t)(end + 2 - b->data);
    }
    return 0;
}

static int read_head(struct client *c, uint64_t now)
{
    struct buffer *b = &c->raw;
    char *end = memmem(b->data + b->at, b->end - b->at, "\r\n\r\n", 4);
    if (!end) return 0;
    *end = 0;
    if (memcmp(b->data + b->at, "HTTP/1.1 200", 12)) {
        if (!refused++) fprintf(stderr, "refused: %.300s\n", b->data + b->at);
        finish(c);
        return 0;
    }
    c->chunked = strcasestr(b->data + b->at, "transfer-encoding: chunked") != NULL;
    b->at = (size_t)(end + 4 - b->data);
    c->state = BODY;
    c->stamped_at = now;
    waiting--;
    answered++;
    times_add(&head_times, now - c->asked_at);
    return 1;
}

static void hear(struct client *c)
{
    int more = receive(c->fd, &c->raw), ended = 0;
    uint64_t now = now_ns();
    if (c->state == HEAD) read_head(c, now);
    if (c->state == BODY) {
        ended = read_body(c);
        read_events(c, now);
        if (c->came >= expected_of(c) && !hold) {
            times_add(&whole_times, now - c->asked_at);
            finish(c);
            return;
        }
    }
    if (c->state != DONE && (more != 1 || ended)) {
        int is_turned_away = ended && c->came == 0 && expected_of(c); /* properly, without an event: come back later */
        if (is_turned_away) turned_away++, c->first = c->end;
        else broken += c->came < expected_of(c) || hold;
        finish(c);
    }
}

static char *field(char **rest)
{
    char *found = strsep(rest, "\t\n");
    if (!found) die("a line of the file lacks a field");
    return found;
}

static void read_file(const char *name)
{
    FILE *file = fopen(name, "r");
    char *line = NULL;
    size_t size = 0;
    if (!file) die(name);
    while (getline(&line, &size, file) > 0) {
        if (total % 256 == 0) clients = realloc(clients, (size_t)(total + 256) * sizeof *clients);
        char *rest = strdup(line);
        struct client *c = &clients[total++];
        memset(c, 0, sizeof *c);
        c->fd = -1;
        c->port = atoi(field(&rest));
        c->stream = (uint32_t)atol(field(&rest));
        c->first = (uint32_t)atol(field(&rest));
        c->end = (uint32_t)atol(field(&rest));
        c->method = field(&rest);
        c->path = field(&rest);
        c->body = field(&rest);
        c->seen = calloc(c->end / 8 + 1, 1);
    }
    free(line);
    fclose(file);
}

static void run(double seconds)
{
    struct epoll_event found[512];
    uint64_t until = now_ns() + (uint64_t)(seconds * 1e9);
    int holding = 0;
    while (finished < total && now_ns() < until) {
        while (begun < total && waiting < flight && (flight > 1 || finished == begun)) begin(&clients[begun++]);
        if (!said_ready && (whole ? full + (int)turned_away : answered) + (int)refused + (int)broken >= total) {
            printf("ready\n");
            fflush(stdout);
            said_ready = 1;
            if (hold) {
                watch(epoll, EPOLL_CTL_ADD, 0, EPOLLIN, NULL);
                holding = 1;
            }
        }
        int n = epoll_wait(epoll, found, 512, 100);
        for (int i = 0; i < n; i++) {
            struct client *c = found[i].data.ptr;
            char byte;
            if (!c) {
                if (holding && read(0, &byte, 1) <= 0) return;
            } else if (c->state == CONNECTING) {
                ask(c);
            } else if (c->state != DONE) {
                hear(c);
            }
        }
    }
}

int main(int argc, char **argv)
{
    double seconds = 60;
    int i;
    for (i = 1; i < argc && !strncmp(argv[i], "--", 2); i++) {
        if (!strcmp(argv[i], "--hold")) hold = 1;
        else if (!strcmp(argv[i], "--whole")) whole = 1;
        else if (!strcmp(argv[i], "--seconds")) seconds = atof(argv[++i]);
        else if (!strcmp(argv[i], "--skip")) skip = (unsigned)atoi(argv[++i]);
        else if (!strcmp(argv[i], "--flight")) flight = atoi(argv[++i]);
        else if (!strcmp(argv[i], "--header")) strcat(strncat(headers, argv[++i], 512), "\r\n");
        else die("unknown option");
    }
    if (i != argc - 1) die("load: one file of clients is wanted");
    signal(SIGPIPE, SIG_IGN);
    read_file(argv[i]);
    epoll = epoll_create1(EPOLL_CLOEXEC);
    uint64_t started = now_ns();
    run(seconds);
    double took = (double)(now_ns() - started) / 1e9;
    uint64_t expected = 0;
    int unfinished = 0;
    for (i = 0; i < total; i++) {
        expected += expected_of(&clients[i]);
        lost += expected_of(&clients[i]) - clients[i].came;
        unfinished += clients[i].came < expected_of(&clients[i]);
    }
    printf("{\"clients\":%d,\"answered\":%d,\"unfinished\":%d,\"expected\":%llu,\"events\":%llu,\"lost\":%llu,", total, answered,
           unfinished, (unsigned long long)expected, (unsigned long long)events_came, (unsigned long long)lost);
    printf("\"doubled\":%llu,\"reordered\":%llu,\"foreign\":%llu,\"refused\":%llu,\"broken\":%llu,\"turned_away\":%llu,\"seconds\":%.4f,\"cpu\":%.3f,",
           (unsigned long long)doubled, (unsigned long long)reordered, (unsigned long long)foreign,
           (unsigned long long)refused, (unsigned long long)broken, (unsigned long long)turned_away, took, cpu_seconds());
    times_print("latency", &latency, 1);
    printf(",");
    times_print("head", &head_times, 0);
    printf(",");
    times_print("first", &first_times, 0);
    printf(",");
    times_print("whole", &whole_times, 0);
    printf("}\n");
    return 0;
}
