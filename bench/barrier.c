// What a barrier and a release of several gates cost a program in C: by raw netlink, or by libnl-route.
// barrier raw|libnl ROUNDS INTERFACE...  ->  the time of each round, nanoseconds, one a line.
#include <linux/netlink.h>
#include <linux/pkt_sched.h>
#include <linux/rtnetlink.h>
#include <net/if.h>
#include <netlink/netlink.h>
#include <netlink/route/qdisc.h>
#include <netlink/route/qdisc/plug.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>

#define MOST 64

struct request {
    struct nlmsghdr header;
    struct tcmsg traffic;
    struct rtattr kind_head;
    char kind[8];
    struct rtattr options_head;
    struct tc_plug_qopt options;
};

static long long now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000LL + t.tv_nsec;
}

static void fail(const char *what)
{
    perror(what);
    exit(1);
}

static struct request encode(int index, unsigned handle, int action)
{
    struct request r = {
        .header = {sizeof r, RTM_NEWQDISC, NLM_F_REQUEST | NLM_F_ACK, 0, 0},
        .traffic = {.tcm_ifindex = index, .tcm_handle = handle, .tcm_parent = TC_H_ROOT},
        .kind_head = {RTA_LENGTH(5), TCA_KIND},
        .kind = "plug",
        .options_head = {RTA_LENGTH(sizeof(struct tc_plug_qopt)), TCA_OPTIONS},
        .options = {.action = action},
    };
    return r;
}

static void ask(int s, struct request *r)
{
    char answer[4096];
    if (send(s, r, sizeof *r, 0) < 0 || recv(s, answer, sizeof answer, 0) < 0)
        fail("netlink");
    const struct nlmsghdr *h = (const void *)answer;
    if (h->nlmsg_type != NLMSG_ERROR || ((const struct nlmsgerr *)NLMSG_DATA(h))->error)
        fail("refused");
}

int main(int argc, char **argv)
{
    int raw = argc > 3 && !strcmp(argv[1], "raw"), rounds = argc > 3 ? atoi(argv[2]) : 0, count = argc - 3;
    struct request buffer[MOST], release[MOST];
    struct rtnl_qdisc *qdisc[MOST];
    if (rounds < 1 || count < 1 || count > MOST)
        return 2;
    int s = socket(AF_NETLINK, SOCK_RAW, NETLINK_ROUTE);
    struct nl_sock *sock = nl_socket_alloc();
    if (s < 0 || !sock || nl_connect(sock, NETLINK_ROUTE))
        fail("socket");
    for (int i = 0; i < count; i++) {
        int index = if_nametoindex(argv[i + 3]);
        buffer[i] = encode(index, 0x10000, TCQ_PLUG_BUFFER);
        release[i] = encode(index, 0x10000, TCQ_PLUG_RELEASE_ONE);
        qdisc[i] = rtnl_qdisc_alloc();
        rtnl_tc_set_ifindex(TC_CAST(qdisc[i]), index);
        rtnl_tc_set_parent(TC_CAST(qdisc[i]), TC_H_ROOT);
        rtnl_tc_set_handle(TC_CAST(qdisc[i]), 0x10000);
        rtnl_tc_set_kind(TC_CAST(qdisc[i]), "plug");
    }
    for (int round = 0; round < rounds; round++) {
        long long began = now_ns();
        for (int i = 0; i < count; i++)
            if (raw)
                ask(s, &buffer[i]);
            else if (rtnl_qdisc_plug_buffer(qdisc[i]) || rtnl_qdisc_add(sock, qdisc[i], 0))
                fail("libnl");
        for (int i = 0; i < count; i++)
            if (raw)
                ask(s, &release[i]);
            else if (rtnl_qdisc_plug_release_one(qdisc[i]) || rtnl_qdisc_add(sock, qdisc[i], 0))
                fail("libnl");
        printf("%lld\n", now_ns() - began);
    }
    return 0;
}
