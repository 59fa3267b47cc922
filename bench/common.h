/* What the programs of the bench share: the clock, growing buffers, sockets, the markers in events.
 *
 * A marker says when its event was sent, of which stream it is and which number it has there: @NANOSECONDS:STREAM:SEQ@.
 * The clock is CLOCK_MONOTONIC, the same for all processes of one machine. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/timerfd.h>
#include <time.h>
#include <unistd.h>

#define UNUSED __attribute__((unused))
#define SECOND 1000000000ULL

static UNUSED uint64_t now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * SECOND + (uint64_t)t.tv_nsec;
}

static UNUSED void die(const char *what)
{
    fprintf(stderr, "%s: %s\n", what, strerror(errno));
    exit(1);
}

/* Bytes from `at` to `end`; what lies before `at` was used up. */
struct buffer {
    char *data;
    size_t at, end, size;
};

static UNUSED void buffer_room(struct buffer *b, size_t more)
{
    if (b->at == b->end) b->at = b->end = 0;
    if (b->end + more <= b->size) return;
    if (b->at) {
        memmove(b->data, b->data + b->at, b->end - b->at);
        b->end -= b->at;
        b->at = 0;
    }
    while (b->size < b->end + more) b->size = b->size ? b->size * 2 : 512;
    b->data = realloc(b->data, b->size);
    if (!b->data) die("realloc");
}

static UNUSED void buffer_add(struct buffer *b, const char *bytes, size_t n)
{
    buffer_room(b, n);
    memcpy(b->data + b->end, bytes, n);
    b->end += n;
}

static UNUSED __attribute__((format(printf, 2, 3))) void buffer_format(struct buffer *b, const char *format, ...)
{
    va_list list;
    buffer_room(b, 2048);
    va_start(list, format);
    int n = vsnprintf(b->data + b->end, b->size - b->end, format, list);
    va_end(list);
    if (n < 0 || (size_t)n >= b->size - b->end) die("a line too long");
    b->end += (size_t)n;
}

static UNUSED void buffer_free(struct buffer *b)
{
    free(b->data);
    memset(b, 0, sizeof *b);
}

static UNUSED void no_delay(int fd)
{
    int on = 1;
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
}

/* A socket on its way to a loopback port, without blocking. */
static UNUSED int dial(int port)
{
    struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port)};
    to.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (fd < 0) die("socket");
    no_delay(fd);
    if (connect(fd, (struct sockaddr *)&to, sizeof to) && errno != EINPROGRESS) {
        close(fd);
        return -1;
    }
    return fd;
}

static UNUSED int listen_on(int port)
{
    struct sockaddr_in at = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port)};
    at.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    int on = 1, fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    if (fd < 0 || bind(fd, (struct sockaddr *)&at, sizeof at) || listen(fd, 4096)) die("listen");
    return fd;
}

static UNUSED void watch(int epoll, int operation, int fd, uint32_t events, void *who)
{
    struct epoll_event event = {.events = events, .data.ptr = who};
    if (epoll_ctl(epoll, operation, fd, &event)) die("epoll_ctl");
}

/* Read all there is. 1: more may come; 0: the other side has closed; -1: it broke. */
static UNUSED int receive(int fd, struct buffer *b)
{
    for (;;) {
        buffer_room(b, 16384);
        ssize_t n = read(fd, b->data + b->end, b->size - b->end);
        if (n > 0) {
            b->end += (size_t)n;
            if (b->end < b->size) return 1;
            continue;
        }
        if (n == 0) return 0;
        if (errno == EINTR) continue;
        return errno == EAGAIN ? 1 : -1;
    }
}

/* Send what there is. 1: all of it; 0: the rest later; -1: it broke. */
static UNUSED int send_out(int fd, struct buffer *b)
{
    while (b->at < b->end) {
        ssize_t n = send(fd, b->data + b->at, b->end - b->at, MSG_NOSIGNAL);
        if (n > 0) b->at += (size_t)n;
        else if (errno == EINTR) continue;
        else return errno == EAGAIN ? 0 : -1;
    }
    b->at = b->end = 0;
    return 1;
}

static UNUSED double cpu_seconds(void)
{
    struct rusage used;
    getrusage(RUSAGE_SELF, &used);
    return (double)(used.ru_utime.tv_sec + used.ru_stime.tv_sec) +
           (double)(used.ru_utime.tv_usec + used.ru_stime.tv_usec) / 1e6;
}

/* Times in a log-linear histogram: 32 steps to each doubling, so a figure is off by 3 % at most. */
#define STEPS 32
#define BUCKETS (64 * STEPS)

struct times {
    uint64_t bucket[BUCKETS], count, sum, max;
};

static UNUSED int bucket_of(uint64_t ns)
{
    if (ns < STEPS) return (int)ns;
    int power = 63 - __builtin_clzll(ns);
    return (power - 4) * STEPS + (int)((ns >> (power - 5)) - STEPS);
}

static UNUSED uint64_t middle_of(int bucket)
{
    if (bucket < STEPS) return (uint64_t)bucket;
    int power = bucket / STEPS + 4;
    uint64_t width = 1ULL << (power - 5);
    return (uint64_t)(STEPS + bucket % STEPS) * width + width / 2;
}

static UNUSED void times_add(struct times *t, uint64_t ns)
{
    t->bucket[bucket_of(ns)]++;
    t->count++;
    t->sum += ns;
    if (ns > t->max) t->max = ns;
}

static UNUSED double times_at(const struct times *t, double share)
{
    uint64_t rank = (uint64_t)(share * (double)t->count), seen = 0;
    if (rank >= t->count) rank = t->count ? t->count - 1 : 0;
    for (int i = 0; i < BUCKETS; i++) {
        seen += t->bucket[i];
        if (seen > rank) return (double)(middle_of(i) < t->max ? middle_of(i) : t->max) / 1e6;
    }
    return 0;
}

/* As JSON, in milliseconds; `curve` gives the distribution too, as [milliseconds, count] pairs. */
static UNUSED void times_print(const char *name, const struct times *t, int curve)
{
    printf("\"%s\":{\"count\":%llu,\"mean\":%.4f,\"p50\":%.4f,\"p90\":%.4f,\"p99\":%.4f,\"p999\":%.4f,\"max\":%.4f", name,
           (unsigned long long)t->count, t->count ? (double)t->sum / (double)t->count / 1e6 : 0.0, times_at(t, 0.5),
           times_at(t, 0.9), times_at(t, 0.99), times_at(t, 0.999), (double)t->max / 1e6);
    if (curve) {
        printf(",\"curve\":[");
        const char *comma = "";
        for (int i = 0; i < BUCKETS; i += 4) {
            uint64_t n = t->bucket[i] + t->bucket[i + 1] + t->bucket[i + 2] + t->bucket[i + 3];
            if (n) printf("%s[%.4f,%llu]", comma, (double)middle_of(i + 2) / 1e6, (unsigned long long)n), comma = ",";
        }
        printf("]");
    }
    printf("}");
}
