/* The model's server of the bench: Chat Completions streams at the pace the prompt asks for, each chunk with a marker.
 *
 *   upstream PORT       a prompt says `bench STREAM COUNT MICROSECONDS ` (0 microseconds: as fast as it is read) */
#include "common.h"

#define STREAMS 65536

struct stream {
    int fd, number, count, sent, place; /* place: in the heap; 0: not in it */
    uint64_t due, pace;
    struct buffer in, out;
    struct stream *next_gone;
};

static struct stream *gone; /* closed; freed when what epoll found has been seen to */
static struct stream *heap[STREAMS]; /* by when they are due; from 1 */
static int waiting, epoll, listener, timer;
static unsigned long long requests;

static void put(int at, struct stream *s)
{
    heap[at] = s;
    s->place = at;
}

static void sift(struct stream *s, int at)
{
    for (; at > 1 && heap[at / 2]->due > s->due; at /= 2) put(at, heap[at / 2]);
    for (int child; (child = at * 2) <= waiting; at = child) {
        if (child < waiting && heap[child + 1]->due < heap[child]->due) child++;
        if (heap[child]->due >= s->due) break;
        put(at, heap[child]);
    }
    put(at, s);
}

static void wait_for(struct stream *s)
{
    sift(s, s->place ? s->place : ++waiting);
}

static void wait_no_more(struct stream *s)
{
    if (!s->place) return;
    struct stream *last = heap[waiting--];
    if (last != s) sift(last, s->place);
    s->place = 0;
}

static void set_timer(void)
{
    struct itimerspec at = {0};
    if (waiting) at.it_value = (struct timespec){.tv_sec = (time_t)(heap[1]->due / SECOND), .tv_nsec = (long)(heap[1]->due % SECOND)};
    timerfd_settime(timer, TFD_TIMER_ABSTIME, &at, NULL);
}

static void add_frame(struct stream *s, const char *choices, const char *extra)
{
    char frame[512];
    int n = snprintf(frame, sizeof frame,
                     "data: {\"id\":\"chatcmpl-bench\",\"object\":\"chat.completion.chunk\",\"created\":1,\"model\":\"bench\","
                     "\"choices\":[%s]%s}\n\n", choices, extra);
    buffer_format(&s->out, "%x\r\n%s\r\n", n, frame);
}

static void add_delta(struct stream *s, const char *text)
{
    char choice[256];
    snprintf(choice, sizeof choice, "{\"index\":0,\"delta\":{\"content\":\"%s\"},\"finish_reason\":null}", text);
    add_frame(s, choice, "");
}

static void add_chunk(struct stream *s)
{
    char text[128];
    snprintf(text, sizeof text, "@%llu:%d:%d@ a word ", (unsigned long long)now_ns(), s->number, s->sent++);
    add_delta(s, text);
    if (s->sent < s->count) return;
    add_frame(s, "{\"index\":0,\"delta\":{},\"finish_reason\":\"stop\"}", "");
    add_frame(s, "", ",\"usage\":{\"prompt_tokens\":7,\"completion_tokens\":7,\"total_tokens\":14}");
    buffer_format(&s->out, "e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n");
}

static void leave(struct stream *s)
{
    wait_no_more(s);
    close(s->fd);
    buffer_free(&s->in);
    buffer_free(&s->out);
    s->fd = -1;
    s->next_gone = gone;
    gone = s;
}

static void free_gone(void)
{
    for (struct stream *s; (s = gone);) {
        gone = s->next_gone;
        free(s);
    }
}

static void write_some(struct stream *s)
{
    int all = send_out(s->fd, &s->out);
    if (all < 0) leave(s);
    else watch(epoll, EPOLL_CTL_MOD, s->fd, all && (s->pace || s->sent == s->count) ? EPOLLIN : EPOLLIN | EPOLLOUT, s);
}

/* Without a pace: as much as the client takes. */
static void go_on(struct stream *s)
{
    while (s->pace == 0 && s->sent < s->count && s->out.end - s->out.at < 65536) add_chunk(s);
    write_some(s);
}

static void begin(struct stream *s, const char *asked)
{
    char *rest;
    s->number = (int)strtol(asked, &rest, 10);
    s->count = (int)strtol(rest, &rest, 10);
    s->pace = strtoull(rest, &rest, 10) * 1000;
    s->sent = 0;
    requests++;
    buffer_format(&s->out, "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n");
    add_frame(s, "{\"index\":0,\"delta\":{\"role\":\"assistant\",\"content\":\"\"},\"finish_reason\":null}", "");
    if (s->pace) {
        add_chunk(s);
        if (s->sent < s->count) { /* streams that begin together are not to speak in step */
            s->due = now_ns() + s->pace + (uint64_t)(s->number % 97) * s->pace / 97;
            wait_for(s);
        }
    }
    go_on(s);
}

static void hear(struct stream *s)
{
    if (receive(s->fd, &s->in) != 1) {
        leave(s);
        return;
    }
    buffer_room(&s->in, 1);
    char *head = s->in.data + s->in.at, *end = memmem(head, s->in.end - s->in.at, "\r\n\r\n", 4);
    if (!end) return;
    *end = 0;
    char *length = strcasestr(head, "content-length:");
    *end = '\r';
    size_t size = length ? (size_t)atol(length + 15) : 0;
    if ((size_t)(s->in.data + s->in.end - end - 4) < size) return;
    char *asked = memmem(end + 4, size, "bench ", 6);
    s->in.data[s->in.end] = 0;
    if (!asked) {
        leave(s);
        return;
    }
    begin(s, asked + 6);
    s->in.at = s->in.end = 0;
}

static void tick(void)
{
    uint64_t expirations, now = now_ns();
    if (read(timer, &expirations, sizeof expirations) < 0 && errno != EAGAIN) die("timer");
    while (waiting && heap[1]->due <= now) {
        struct stream *s = heap[1];
        add_chunk(s);
        s->due += s->pace;
        if (s->sent < s->count) wait_for(s);
        else wait_no_more(s);
        write_some(s);
    }
}

static void welcome(void)
{
    int fd;
    while ((fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC)) >= 0) {
        struct stream *s = calloc(1, sizeof *s);
        no_delay(fd);
        s->fd = fd;
        watch(epoll, EPOLL_CTL_ADD, fd, EPOLLIN, s);
    }
}

int main(int argc, char **argv)
{
    struct epoll_event found[256];
    if (argc != 2) die("upstream: port");
    signal(SIGPIPE, SIG_IGN);
    epoll = epoll_create1(EPOLL_CLOEXEC);
    listener = listen_on(atoi(argv[1]));
    timer = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC);
    watch(epoll, EPOLL_CTL_ADD, listener, EPOLLIN, &listener);
    watch(epoll, EPOLL_CTL_ADD, timer, EPOLLIN, &timer);
    for (;;) {
        set_timer();
        int n = epoll_wait(epoll, found, 256, -1);
        for (int i = 0; i < n; i++) {
            void *who = found[i].data.ptr;
            if (who == &listener) welcome();
            else if (who == &timer) tick();
            else if (((struct stream *)who)->fd < 0) continue;
            else if (found[i].events & (EPOLLIN | EPOLLHUP | EPOLLERR)) hear(who);
            else go_on(who);
        }
        free_gone();
    }
}
