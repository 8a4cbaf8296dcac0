/*
 * chain: the program inside the tiny guest. It keeps one hash chain per TCP connection in RAM and
 * on every disk, and checks with each word that neither is older or newer than the other.
 *
 * Port 5001, one line each way:
 *   client: HELLO <id: 16 hex digits>
 *   guest:  HELLO <id> slot <s> disks <d> blocks <N> pages <P> draw <k>
 *   client: <word, at most 400 bytes>
 *   guest:  <n> <draws> <draw: 16 hex digits or -> <hash: 32 hex digits> <status of each disk, or ->
 * Port 5002: ping, poweroff, reboot or panic.
 *
 *   hash(0) = BLAKE2s-128(id as 8 bytes, little endian)
 *   hash(n) = BLAKE2s-128(hash(n-1), n as 8 bytes, 8 table entries, draw as 8 bytes if any, word)
 *
 * Entry i of the eight is the first 16 bytes of page (bytes 2i and 2i+1 of hash(n-1), little endian,
 * modulo P) of the connection's table, and becomes hash(n): a page of RAM that a checkpoint missed
 * breaks the chain when it is next used. Every draw-th word adds 8 bytes from the kernel's generator.
 *
 * Disk block (512 bytes, at (s * N + n mod N) * 512): see struct block. Before block n is written the
 * guest reads from the device what is there (must be block n-N, or of another connection while n <= N;
 * else BAD-FUTURE or BAD-PAST), block n-1, and one older block chosen by hash(n-1), whose hashes it
 * remembers in RAM.
 *
 * chain [draw [port [file...]]]: the program also runs outside a guest, on other ports and on files.
 *
 * Both copies run under COLO and their outputs are compared, so apart from draws the output depends
 * on the input alone: no clock, no address, no order of arrival.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <linux/fs.h>
#include <linux/random.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/reboot.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum {
    SLOTS = 16,        /* connections at a time, and areas of a disk */
    PAGES = 1024,      /* table of a connection: 4 MiB */
    PAGE = 4096,
    BLOCK = 512,
    RING_MAX = 1024,   /* blocks of a slot's area; fewer on a small disk */
    DISKS = 16,
    LINE = 512,
    OUT = 32768,
    BEAT_MS = 250,
};

/* --- BLAKE2s (RFC 7693), 16-byte digest, no key ------------------------------------------------ */

struct blake2s {
    uint32_t h[8];
    uint64_t length;
    uint8_t buffer[64];
    size_t used;
};

static const uint32_t IV[8] = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                               0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
static const uint8_t SIGMA[10][16] = {
    {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15},
    {14, 10, 4, 8, 9, 15, 13, 6, 1, 12, 0, 2, 11, 7, 5, 3},
    {11, 8, 12, 0, 5, 2, 15, 13, 10, 14, 3, 6, 7, 1, 9, 4},
    {7, 9, 3, 1, 13, 12, 11, 14, 2, 6, 5, 10, 4, 0, 15, 8},
    {9, 0, 5, 7, 2, 4, 10, 15, 14, 1, 11, 12, 6, 8, 3, 13},
    {2, 12, 6, 10, 0, 11, 8, 3, 4, 13, 7, 5, 15, 14, 1, 9},
    {12, 5, 1, 15, 14, 13, 4, 10, 0, 7, 6, 3, 9, 2, 8, 11},
    {13, 11, 7, 14, 12, 1, 3, 9, 5, 0, 15, 4, 8, 6, 2, 10},
    {6, 15, 14, 9, 11, 3, 0, 8, 12, 2, 13, 7, 1, 4, 10, 5},
    {10, 2, 8, 4, 7, 6, 1, 5, 15, 11, 9, 14, 3, 12, 13, 0},
};

static uint32_t rotr(uint32_t x, int by) { return x >> by | x << (32 - by); }

static void mix(uint32_t *v, int a, int b, int c, int d, uint32_t x, uint32_t y)
{
    v[a] += v[b] + x; v[d] = rotr(v[d] ^ v[a], 16);
    v[c] += v[d];     v[b] = rotr(v[b] ^ v[c], 12);
    v[a] += v[b] + y; v[d] = rotr(v[d] ^ v[a], 8);
    v[c] += v[d];     v[b] = rotr(v[b] ^ v[c], 7);
}

static void compress(struct blake2s *s, int last)
{
    uint32_t v[16], m[16];
    memcpy(m, s->buffer, 64); /* the guest is little endian */
    memcpy(v, s->h, 32);
    memcpy(v + 8, IV, 32);
    v[12] ^= (uint32_t)s->length;
    v[13] ^= (uint32_t)(s->length >> 32);
    if (last)
        v[14] = ~v[14];
    for (int round = 0; round < 10; round++) {
        const uint8_t *p = SIGMA[round];
        for (int i = 0; i < 4; i++)
            mix(v, i, 4 + i, 8 + i, 12 + i, m[p[2 * i]], m[p[2 * i + 1]]);
        for (int i = 0; i < 4; i++)
            mix(v, i, 4 + (i + 1) % 4, 8 + (i + 2) % 4, 12 + (i + 3) % 4, m[p[8 + 2 * i]], m[p[9 + 2 * i]]);
    }
    for (int i = 0; i < 8; i++)
        s->h[i] ^= v[i] ^ v[8 + i];
}

static void hash_begin(struct blake2s *s)
{
    memset(s, 0, sizeof *s);
    memcpy(s->h, IV, 32);
    s->h[0] ^= 0x01010000 ^ 16;
}

static void hash_add(struct blake2s *s, const void *data, size_t size)
{
    for (const uint8_t *p = data; size--; p++) {
        if (s->used == 64) {
            s->length += 64;
            compress(s, 0);
            s->used = 0;
        }
        s->buffer[s->used++] = *p;
    }
}

static void hash_end(struct blake2s *s, uint8_t out[16])
{
    s->length += s->used;
    memset(s->buffer + s->used, 0, 64 - s->used);
    compress(s, 1);
    memcpy(out, s->h, 16);
}

/* --- Disks --------------------------------------------------------------------------------------- */

struct block {
    char magic[8];     /* "USCHAIN1" */
    uint64_t id;       /* of the connection, chosen by the client */
    uint64_t n;
    uint32_t disk;     /* 0 is vda */
    uint32_t slot;
    uint8_t hash[16];  /* hash(n) */
    uint8_t fill[BLOCK - 64]; /* hash(n) again and again, so that a torn block shows */
    uint8_t sum[16];   /* BLAKE2s-128 of all of the above */
};
_Static_assert(sizeof(struct block) == BLOCK, "a block is one sector");

struct connection {
    int fd;
    int greeted, closing;
    uint64_t id, n, draws;
    uint8_t hash[16];
    uint8_t *table;                  /* PAGES pages, zero at first */
    uint8_t history[RING_MAX][16];   /* hash(m) at m mod ring */
    size_t in_used, out_used;
    char in[LINE], out[OUT];
};

static int disks[DISKS], disk_count;
static uint64_t ring = RING_MAX;
static unsigned draw_every;
static struct connection connections[SLOTS];

static int add_disk(const char *path, int flags)
{
    uint64_t size;
    int fd = disk_count < DISKS ? open(path, O_RDWR | O_DSYNC | flags) : -1;
    if (fd < 0)
        return 0;
    if (ioctl(fd, BLKGETSIZE64, &size) == 0 && size / (SLOTS * BLOCK) < ring)
        ring = size / (SLOTS * BLOCK);
    if (ring < 4)
        exit(1); /* less than 32 KiB is no disk for this program */
    disks[disk_count++] = fd;
    return 1;
}

static void block_sum(const struct block *b, uint8_t out[16])
{
    struct blake2s s;
    hash_begin(&s);
    hash_add(&s, b, offsetof(struct block, sum));
    hash_end(&s, out);
}

static off_t block_offset(const struct connection *c, uint64_t n)
{
    return (off_t)(((uint64_t)(c - connections) * ring + n % ring) * BLOCK);
}

/* Read where block n belongs; say in *owned whether a whole block of this connection is there. */
static const char *read_block(const struct connection *c, int disk, uint64_t n, struct block *b, int *owned)
{
    uint8_t sum[16];
    *owned = 0;
    if (pread(disks[disk], b, BLOCK, block_offset(c, n)) != BLOCK)
        return "IO-READ";
    if (memcmp(b->magic, "USCHAIN1", 8) || b->id != c->id)
        return NULL;
    block_sum(b, sum);
    if (memcmp(sum, b->sum, 16) || b->disk != (uint32_t)disk)
        return "BAD-SUM";
    *owned = 1;
    return NULL;
}

/* Demand block m, written earlier by this connection. */
static const char *verify_block(const struct connection *c, int disk, uint64_t m, struct block *b)
{
    int owned;
    const char *wrong = read_block(c, disk, m, b, &owned);
    if (wrong)
        return wrong;
    if (!owned || b->n < m)
        return "BAD-PAST";
    if (b->n > m)
        return "BAD-FUTURE";
    return memcmp(b->hash, c->history[m % ring], 16) ? "BAD-HASH" : NULL;
}

/* Check one disk before word n and write block n to it; before[] is hash(n-1). */
static const char *step_disk(const struct connection *c, int disk, const uint8_t before[16])
{
    static struct block b __attribute__((aligned(4096)));
    uint64_t n = c->n, back;
    int owned;
    const char *wrong, *first = read_block(c, disk, n, &b, &owned);
    if (!first && owned && (n <= ring || b.n > n - ring))
        first = "BAD-FUTURE";
    if (!first && n > ring && (!owned || b.n < n - ring))
        first = "BAD-PAST";
    if (n > 1 && (wrong = verify_block(c, disk, n - 1, &b)) && !first)
        first = wrong;
    if (n > 2) {
        /* 1 is the block before, checked already; ring would be the place of block n itself. */
        uint64_t oldest = n - 1 < ring - 1 ? n - 1 : ring - 1;
        memcpy(&back, before, 8);
        back = oldest < 2 ? 1 : 2 + back % (oldest - 1);
        if ((wrong = verify_block(c, disk, n - back, &b)) && !first)
            first = wrong;
    }
    memset(&b, 0, sizeof b);
    memcpy(b.magic, "USCHAIN1", 8);
    b.id = c->id;
    b.n = n;
    b.disk = (uint32_t)disk;
    b.slot = (uint32_t)(c - connections);
    memcpy(b.hash, c->hash, 16);
    for (size_t i = 0; i < sizeof b.fill; i++)
        b.fill[i] = c->hash[i % 16];
    block_sum(&b, b.sum);
    if (pwrite(disks[disk], &b, BLOCK, block_offset(c, n)) != BLOCK && !first)
        first = "IO-WRITE";
    return first ? first : "ok";
}

/* --- Words ----------------------------------------------------------------------------------------- */

static void say(struct connection *c, const char *text, size_t size)
{
    if (c->out_used + size > OUT) {
        c->closing = 1; /* cannot happen: input is not taken while the output is nearly full */
        return;
    }
    memcpy(c->out + c->out_used, text, size);
    c->out_used += size;
}

static int generator = -1; /* the kernel's generator of random numbers */

/* Both copies of the guest have the generator's state, and would draw the same until it is seeded
 * anew, which happens once a minute. Seeding it now mixes in the cycle counter, which differs. */
static uint64_t draw_value(void)
{
    uint64_t draw;
    ioctl(generator, RNDRESEEDCRNG);
    while (getrandom(&draw, 8, 0) != 8)
        ;
    return draw;
}

/* An emulated processor with nothing to do takes a second to gather the 256 bits without which
 * getrandom() waits. Nobody's secrets depend on this guest, so the clock has to do. */
static void seed_generator(void)
{
    struct { struct rand_pool_info info; struct timespec now[2]; } seed;
    seed.info.entropy_count = 256;
    seed.info.buf_size = sizeof seed.now;
    clock_gettime(CLOCK_REALTIME, seed.now);
    clock_gettime(CLOCK_MONOTONIC, seed.now + 1);
    generator = open("/dev/urandom", O_RDONLY);
    if (getpid() == 1)
        ioctl(generator, RNDADDENTROPY, &seed);
}

static size_t hex(char *to, const uint8_t *from, size_t size)
{
    for (size_t i = 0; i < size; i++)
        sprintf(to + 2 * i, "%02x", from[i]);
    return 2 * size;
}

static void greet(struct connection *c, const char *line)
{
    char reply[LINE];
    struct blake2s s;
    if (sscanf(line, "HELLO %16" SCNx64, &c->id) != 1) {
        say(c, "ERROR say HELLO first\n", 22);
        c->closing = 1;
        return;
    }
    hash_begin(&s);
    hash_add(&s, &c->id, 8);
    hash_end(&s, c->hash);
    c->greeted = 1;
    say(c, reply, (size_t)snprintf(reply, sizeof reply,
        "HELLO %016" PRIx64 " slot %d disks %d blocks %" PRIu64 " pages %d draw %u\n",
        c->id, (int)(c - connections), disk_count, ring, PAGES, draw_every));
}

static void step(struct connection *c, const char *word)
{
    uint8_t before[16], *entry[8];
    uint64_t draw = 0;
    char reply[LINE], *p = reply;
    struct blake2s s;

    memcpy(before, c->hash, 16);
    c->n++;
    hash_begin(&s);
    hash_add(&s, before, 16);
    hash_add(&s, &c->n, 8);
    for (int i = 0; i < 8; i++) {
        entry[i] = c->table + (size_t)((before[2 * i] | before[2 * i + 1] << 8) % PAGES) * PAGE;
        hash_add(&s, entry[i], 16);
    }
    int draws = draw_every && c->n % draw_every == 0;
    if (draws) {
        draw = draw_value();
        c->draws++;
        hash_add(&s, &draw, 8);
    }
    hash_add(&s, word, strlen(word));
    hash_end(&s, c->hash);
    for (int i = 0; i < 8; i++)
        memcpy(entry[i], c->hash, 16);

    p += sprintf(p, "%" PRIu64 " %" PRIu64 " ", c->n, c->draws);
    p += draws ? (long)hex(p, (uint8_t *)&draw, 8) : sprintf(p, "-");
    *p++ = ' ';
    p += hex(p, c->hash, 16);
    for (int disk = 0; disk < disk_count; disk++)
        p += sprintf(p, "%c%s", disk ? ',' : ' ', step_disk(c, disk, before));
    p += sprintf(p, disk_count ? "\n" : " -\n");
    memcpy(c->history[c->n % ring], c->hash, 16);
    say(c, reply, (size_t)(p - reply));
}

/* --- Sockets ----------------------------------------------------------------------------------------- */

static void end(struct connection *c)
{
    close(c->fd);
    munmap(c->table, (size_t)PAGES * PAGE);
    c->fd = -1;
}

static void begin(int listener)
{
    int fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK), yes = 1;
    if (fd < 0)
        return;
    for (struct connection *c = connections; c < connections + SLOTS; c++)
        if (c->fd < 0) {
            memset(c, 0, sizeof *c);
            c->fd = fd;
            c->table = mmap(NULL, (size_t)PAGES * PAGE, PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
            if (c->table == MAP_FAILED)
                break;
            setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &yes, sizeof yes);
            return;
        }
    close(fd);
}

static void take(struct connection *c)
{
    char *line = c->in, *stop;
    ssize_t got = read(c->fd, c->in + c->in_used, LINE - c->in_used);
    if (got == 0 || (got < 0 && errno != EAGAIN && errno != EINTR)) {
        end(c);
        return;
    }
    if (got < 0)
        return;
    c->in_used += (size_t)got;
    while (!c->closing && (stop = memchr(line, '\n', c->in_used - (size_t)(line - c->in)))) {
        *stop = 0;
        if (c->greeted)
            step(c, line);
        else
            greet(c, line);
        line = stop + 1;
    }
    c->in_used -= (size_t)(line - c->in);
    memmove(c->in, line, c->in_used);
    if (c->in_used == LINE)
        c->closing = 1; /* a line that long is not of our protocol */
}

static void give(struct connection *c)
{
    ssize_t done = send(c->fd, c->out, c->out_used, MSG_NOSIGNAL);
    if (done < 0) {
        if (errno != EAGAIN && errno != EINTR)
            end(c);
        return;
    }
    c->out_used -= (size_t)done;
    memmove(c->out, c->out + done, c->out_used);
}

static int listen_on(int port)
{
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port)};
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0), yes = 1;
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof yes);
    if (bind(fd, (struct sockaddr *)&address, sizeof address) || listen(fd, 64))
        exit(1);
    return fd;
}

static void command(int listener)
{
    char word[32] = "";
    struct timeval wait = {.tv_sec = 2};
    int fd = accept(listener, NULL, NULL);
    if (fd < 0)
        return;
    setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &wait, sizeof wait);
    if (read(fd, word, sizeof word - 1) <= 0)
        word[0] = 0;
    word[strcspn(word, "\r\n")] = 0;
    if (!strcmp(word, "ping"))
        send(fd, "pong\n", 5, MSG_NOSIGNAL);
    else if (strcmp(word, "poweroff") && strcmp(word, "reboot") && strcmp(word, "panic"))
        send(fd, "ERROR unknown command\n", 22, MSG_NOSIGNAL);
    else if (getpid() != 1) /* not in a guest: never touch the machine that runs the tests */
        send(fd, "ERROR not in a guest\n", 21, MSG_NOSIGNAL);
    else if (!strcmp(word, "panic"))
        exit(1); /* the end of the first process is a kernel panic */
    else
        reboot(strcmp(word, "reboot") ? RB_POWER_OFF : RB_AUTOBOOT);
    close(fd);
}

static int64_t now_ms(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000 + t.tv_nsec / 1000000;
}

int main(int argc, char **argv)
{
    uint64_t beats = 0;
    draw_every = argc > 1 ? (unsigned)atoi(argv[1]) : 64;
    int port = argc > 2 ? atoi(argv[2]) : 5001;
    char path[] = "/dev/vda";
    signal(SIGPIPE, SIG_IGN);
    if (argc > 2)
        for (int i = 3; i < argc; i++)
            add_disk(argv[i], 0);
    else /* past the page cache: every read comes from the device */
        while (add_disk(path, O_DIRECT))
            path[7]++;
    for (int i = 0; i < SLOTS; i++)
        connections[i].fd = -1;
    seed_generator();
    int words = listen_on(port), commands = listen_on(port + 1);
    for (int64_t next = now_ms();;) {
        struct pollfd fds[SLOTS + 2] = {{.fd = words, .events = POLLIN}, {.fd = commands, .events = POLLIN}};
        for (int i = 0; i < SLOTS; i++) {
            struct connection *c = connections + i;
            fds[i + 2].fd = c->fd;
            if (!c->closing && c->out_used < OUT / 2)
                fds[i + 2].events = POLLIN;
            if (c->out_used)
                fds[i + 2].events |= POLLOUT;
        }
        int64_t left = next - now_ms();
        if (left <= 0) {
            printf("CTR %" PRIu64 "\n", ++beats);
            fflush(stdout);
            next = left < -BEAT_MS ? now_ms() + BEAT_MS : next + BEAT_MS;
            continue;
        }
        if (poll(fds, SLOTS + 2, (int)left) < 0)
            continue;
        for (int i = 0; i < SLOTS; i++) {
            struct connection *c = connections + i;
            if (c->fd >= 0 && fds[i + 2].revents & (POLLIN | POLLHUP | POLLERR))
                take(c);
            if (c->fd >= 0 && c->out_used)
                give(c);
            if (c->fd >= 0 && c->closing && !c->out_used)
                end(c);
        }
        if (fds[0].revents)
            begin(words);
        if (fds[1].revents)
            command(commands);
    }
}
