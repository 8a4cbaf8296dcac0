/*
 * The service of a guest in the Xen bed, on TCP port 7:  counter KIB
 *
 * A client sends lines "K\n", K being a number of its own; each is answered by "N K TOTAL UPTIME\n": N counts the
 * lines of this connection, TOTAL those of all connections since the guest was booted, UPTIME is in seconds. TOTAL is
 * nowhere but in this process' memory: an increment that a client has been told of and that a later reply does not
 * include is an increment that was lost.
 *
 * Every 200 ms it writes KIB kibibytes of memory and says "COUNT ROUND TOTAL UPTIME" on its standard output.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { PORT = 7, CLIENTS = 64, LINE = 64, PERIOD_MS = 200, PAGE = 4096 };

struct client {
    unsigned long lines;
    size_t have;
    char partial[LINE];
};

static unsigned long total;

static double uptime(void)
{
    struct timespec now;
    clock_gettime(CLOCK_BOOTTIME, &now);
    return now.tv_sec + now.tv_nsec / 1e9;
}

/* The socket is blocking: a client that does not read holds up everybody, and nothing is dropped. */
static int say(int fd, const char *text, size_t left)
{
    while (left > 0) {
        ssize_t sent = send(fd, text, left, MSG_NOSIGNAL);
        if (sent < 0 && errno == EINTR)
            continue;
        if (sent <= 0)
            return -1;
        text += sent;
        left -= sent;
    }
    return 0;
}

/* Answer every whole line; -1 when the client is gone or sends a line that is too long. */
static int serve(int fd, struct client *client)
{
    ssize_t got = recv(fd, client->partial + client->have, LINE - client->have, 0);
    if (got <= 0)
        return -1;
    client->have += got;
    char *end;
    while ((end = memchr(client->partial, '\n', client->have)) != NULL) {
        char reply[3 * LINE];
        size_t length = end - client->partial;
        int size = snprintf(reply, sizeof reply, "%lu %.*s %lu %.3f\n", ++client->lines, (int)length, client->partial,
                            ++total, uptime());
        if (say(fd, reply, size) < 0)
            return -1;
        client->have -= length + 1;
        memmove(client->partial, end + 1, client->have);
    }
    return client->have == LINE ? -1 : 0;
}

int main(int argc, char **argv)
{
    size_t dirty = (argc > 1 ? strtoul(argv[1], NULL, 10) : 64) * 1024;
    unsigned char *memory = malloc(dirty + PAGE);
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(PORT)};
    int on = 1, listener = socket(AF_INET, SOCK_STREAM, 0);
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    if (memory == NULL || bind(listener, (struct sockaddr *)&address, sizeof address) < 0 ||
        listen(listener, CLIENTS) < 0) {
        perror("counter");
        return 1;
    }
    static struct client clients[CLIENTS];
    static struct pollfd fds[CLIENTS + 1];
    int count = 0;
    unsigned long round = 0;
    double next = uptime();
    for (;;) {
        fds[count] = (struct pollfd){.fd = count < CLIENTS ? listener : -1, .events = POLLIN};
        double left = next - uptime();
        poll(fds, count + 1, left > 0 ? (int)(left * 1000) + 1 : 0);
        if (fds[count].revents & POLLIN) {
            int fd = accept(listener, NULL, NULL);
            if (fd >= 0) {
                setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
                clients[count] = (struct client){0};
                fds[count++] = (struct pollfd){.fd = fd, .events = POLLIN};
            }
        }
        for (int i = count - 1; i >= 0; i--) {
            if (fds[i].revents == 0 || serve(fds[i].fd, &clients[i]) == 0)
                continue;
            close(fds[i].fd);
            count--;
            fds[i] = fds[count];
            clients[i] = clients[count];
        }
        if (uptime() < next)
            continue;
        next = uptime() + PERIOD_MS / 1e3;
        round++;
        for (size_t at = 0; at < dirty; at += PAGE)
            memory[at] = round;
        printf("COUNT %lu %lu %.3f\n", round, total, uptime());
        fflush(stdout);
    }
}
