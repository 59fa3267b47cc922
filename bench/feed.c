/* Writes timed events into many streams at a steady rate, in the way that each system is written to.
 *
 *   feed rejoin PORT RATE SECONDS FILE SCRIPT_SHA     Rejoin's own append script, as its worker calls it
 *   feed xadd   PORT RATE SECONDS FILE                XADD alone, in pipelines
 *   feed post   PORT RATE SECONDS FILE LANES TYPE     one POST for each event, LANES of them at once
 *
 * Each line of FILE is one stream, parted by tabs: order, log, leases, id, channel, epoch for rejoin; the key for xadd;
 * the path for post. Flushes when idle and gathers when busy: a lane has one request in flight, and what falls due
 * meanwhile goes into the next. An event is stamped when it is sent. Prints one line of JSON. */
#include "resp.h"

#define GATHER 256 /* events in one append: what the writer of Rejoin's worker allows itself */

struct stream {
    char *order, *log, *leases, *id, *channel, *epoch;
};

struct lane {
    int fd;
    uint64_t next, asked_at; /* next: of this lane's own events */
    int streams, number, in_flight;
    struct buffer out, in;
};

enum { REJOIN, XADD, POST } mode;
static struct stream *streams;
static int total, lanes_total = 1;
static uint64_t started, events_all, sent, requests, worst_lag;
static double rate;
static const char *sha, *content_type;
static unsigned errors;
static struct times asked;

static char *field(char **rest)
{
    char *found = strsep(rest, "\t\n");
    return found ? found : "";
}

static void read_file(const char *name)
{
    FILE *file = fopen(name, "r");
    char *line = NULL;
    size_t size = 0;
    if (!file) die(name);
    while (getline(&line, &size, file) > 0) {
        if (total % 256 == 0) streams = realloc(streams, (size_t)(total + 256) * sizeof *streams);
        char *rest = strdup(line);
        struct stream *s = &streams[total++];
        s->order = field(&rest), s->log = field(&rest), s->leases = field(&rest);
        s->id = field(&rest), s->channel = field(&rest), s->epoch = field(&rest);
    }
    free(line);
    fclose(file);
}

/* A lane's event j: of which stream, with which number, due when. Streams take turns, so load is spread evenly. */
static int stream_of(const struct lane *l, uint64_t j) { return l->number + (int)(j % (uint64_t)l->streams) * lanes_total; }
static uint64_t seq_of(const struct lane *l, uint64_t j) { return j / (uint64_t)l->streams; }
static uint64_t index_of(const struct lane *l, uint64_t j) { return seq_of(l, j) * (uint64_t)total + (uint64_t)stream_of(l, j); }
static uint64_t due_at(const struct lane *l, uint64_t j) { return started + (uint64_t)((double)index_of(l, j) * 1e9 / rate); }

static size_t event_text(char *to, size_t size, uint64_t now, int stream, uint64_t seq)
{
    const char *format = mode == POST ? "{\"text\":\"@%llu:%d:%llu@ a word \"}" : "{\"type\":\"text.delta\",\"text\":\"@%llu:%d:%llu@ a word \"}";
    return (size_t)snprintf(to, size, format, (unsigned long long)now, stream, (unsigned long long)seq);
}

static void one_append(struct lane *l, uint64_t from, uint64_t count, uint64_t now)
{
    /* Events of one stream stand next to each other in an append: `count` events touch min(count, streams) of them. */
    uint64_t touched = count < (uint64_t)l->streams ? count : (uint64_t)l->streams;
    char text[160];
    resp_array(&l->out, (int)(3 + 3 * touched + 4 + 6 * touched + count));
    resp_text(&l->out, "EVALSHA");
    resp_text(&l->out, sha);
    resp_number(&l->out, (long long)(3 * touched));
    for (uint64_t j = from; j < from + touched; j++) {
        struct stream *s = &streams[stream_of(l, j)];
        resp_text(&l->out, s->order), resp_text(&l->out, s->log), resp_text(&l->out, s->leases);
    }
    resp_text(&l->out, "600000"), resp_text(&l->out, "86400000");
    resp_text(&l->out, "86400000"), resp_text(&l->out, "604800000");
    for (uint64_t j = from; j < from + touched; j++) {
        struct stream *s = &streams[stream_of(l, j)];
        int n = (int)((from + count - 1 - j) / (uint64_t)l->streams) + 1;
        resp_text(&l->out, s->id), resp_text(&l->out, s->channel), resp_text(&l->out, s->epoch);
        resp_number(&l->out, (long long)seq_of(l, j) + 1);
        resp_text(&l->out, "");
        resp_number(&l->out, n);
        for (int i = 0; i < n; i++)
            resp_string(&l->out, text, event_text(text, sizeof text, now, stream_of(l, j), seq_of(l, j) + (uint64_t)i));
    }
    l->in_flight = 1;
}

static void some_xadds(struct lane *l, uint64_t from, uint64_t count, uint64_t now)
{
    char text[160];
    for (uint64_t j = from; j < from + count; j++) {
        resp_array(&l->out, 5);
        resp_text(&l->out, "XADD");
        resp_text(&l->out, streams[stream_of(l, j)].order);
        resp_text(&l->out, "*");
        resp_text(&l->out, "data");
        resp_string(&l->out, text, event_text(text, sizeof text, now, stream_of(l, j), seq_of(l, j)));
    }
    l->in_flight = (int)count;
}

static void one_post(struct lane *l, uint64_t j, uint64_t now)
{
    char text[160];
    size_t n = event_text(text, sizeof text, now, stream_of(l, j), seq_of(l, j));
    buffer_format(&l->out, "POST %s HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: %s\r\nContent-Length: %zu\r\n\r\n",
                  streams[stream_of(l, j)].order, content_type, n);
    buffer_add(&l->out, text, n);
    l->in_flight = 1;
}

/* Send what is due by now, if nothing is in flight. */
static void flush(struct lane *l, uint64_t now)
{
    uint64_t count = 0, most = mode == POST ? 1 : GATHER;
    if (l->in_flight || l->streams == 0) return;
    while (count < most && index_of(l, l->next + count) < events_all && due_at(l, l->next + count) <= now) count++;
    if (!count) return;
    uint64_t lag = now - due_at(l, l->next);
    if (lag > worst_lag) worst_lag = lag;
    if (mode == REJOIN) one_append(l, l->next, count, now);
    else if (mode == XADD) some_xadds(l, l->next, count, now);
    else one_post(l, l->next, now);
    l->next += count;
    l->asked_at = now;
    sent += count;
    requests++;
    if (send_out(l->fd, &l->out) < 0) die("send");
}

/* A whole HTTP answer, by its content length or as chunks; a 4xx or 5xx is an error. */
static int skip_answer(struct buffer *b)
{
    char *head = b->data + b->at, *end = memmem(head, b->end - b->at, "\r\n\r\n", 4);
    if (!end) return 0;
    if (head[9] >= '4' && !errors++) fprintf(stderr, "http: %.*s\n", (int)(end - head), head);
    *end = 0;
    char *length = strcasestr(head, "content-length:"), *chunked = strcasestr(head, "transfer-encoding: chunked");
    *end = '\r';
    size_t body = (size_t)(end + 4 - b->data);
    if (chunked) {
        char *last = memmem(b->data + body, b->end - body, "0\r\n\r\n", 5);
        if (!last) return 0;
        b->at = (size_t)(last + 5 - b->data);
        return 1;
    }
    body += length ? (size_t)atol(length + 15) : 0;
    if (body > b->end) return 0;
    b->at = body;
    return 1;
}

/* The script's answers are words; any but OK means that what was sent is not in the log. */
static void check_words(const struct lane *l)
{
    static const char *bad[] = {"FENCED", "GAP", "GONE", "ABANDONED"};
    for (int i = 0; i < 4 && l->in.end > l->in.at; i++)
        if (memmem(l->in.data + l->in.at, l->in.end - l->in.at, bad[i], strlen(bad[i])) && !errors++)
            fprintf(stderr, "an append was refused: %s\n", bad[i]);
}

static void hear(struct lane *l, uint64_t now)
{
    if (receive(l->fd, &l->in) != 1) die("the connection was closed");
    if (mode == REJOIN) check_words(l);
    while (l->in_flight && l->in.at < l->in.end) {
        int whole = mode == POST ? skip_answer(&l->in) : resp_skip(l->in.data, l->in.end, &l->in.at, &errors);
        if (!whole) return;
        if (--l->in_flight == 0) times_add(&asked, now - l->asked_at);
    }
}

int main(int argc, char **argv)
{
    if (argc < 6) die("feed: mode, port, rate, seconds, file");
    mode = !strcmp(argv[1], "rejoin") ? REJOIN : !strcmp(argv[1], "xadd") ? XADD : POST;
    rate = atof(argv[3]);
    read_file(argv[5]);
    if (mode == REJOIN) sha = argv[6];
    if (mode == POST) lanes_total = atoi(argv[6]), content_type = argv[7];
    events_all = (uint64_t)(rate * atof(argv[4])) / (uint64_t)total * (uint64_t)total;
    struct lane *lanes = calloc((size_t)lanes_total, sizeof *lanes);
    struct pollfd *polled = calloc((size_t)lanes_total, sizeof *polled);
    for (int i = 0; i < lanes_total; i++) {
        lanes[i].number = i;
        lanes[i].streams = (total - i + lanes_total - 1) / lanes_total;
        if ((lanes[i].fd = dial(atoi(argv[2]))) < 0) die("connect");
        polled[i] = (struct pollfd){.fd = lanes[i].fd, .events = POLLOUT};
        poll(&polled[i], 1, 5000);
        polled[i].events = POLLIN;
    }
    started = now_ns() + SECOND / 20;
    uint64_t give_up_at = started + (uint64_t)((atof(argv[4]) * 3 + 10) * 1e9);
    int busy = 1;
    while ((sent < events_all || busy) && now_ns() < give_up_at) {
        uint64_t now = now_ns(), soonest = now + SECOND / 10;
        busy = 0;
        for (int i = 0; i < lanes_total; i++) {
            struct lane *l = &lanes[i];
            flush(l, now);
            busy |= l->in_flight;
            if (l->out.at < l->out.end && send_out(l->fd, &l->out) < 0) die("send");
            if (!l->in_flight && l->streams && index_of(l, l->next) < events_all && due_at(l, l->next) < soonest)
                soonest = due_at(l, l->next);
            polled[i].events = l->out.at < l->out.end ? POLLIN | POLLOUT : POLLIN;
        }
        now = now_ns();
        uint64_t wait = soonest > now ? soonest - now : 0;
        struct timespec pause = {.tv_sec = (time_t)(wait / SECOND), .tv_nsec = (long)(wait % SECOND)};
        if (ppoll(polled, (nfds_t)lanes_total, &pause, NULL) <= 0) continue;
        now = now_ns();
        for (int i = 0; i < lanes_total; i++)
            if (polled[i].revents & POLLIN) hear(&lanes[i], now);
    }
    double took = (double)(now_ns() - started) / 1e9;
    printf("{\"sent\":%llu,\"requests\":%llu,\"errors\":%u,\"seconds\":%.4f,\"worst_lag_ms\":%.3f,\"cpu\":%.3f,",
           (unsigned long long)sent, (unsigned long long)requests, errors, took, (double)worst_lag / 1e6, cpu_seconds());
    times_print("asked", &asked, 0);
    printf("}\n");
    return errors || sent < events_all;
}
