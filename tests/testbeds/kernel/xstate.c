/*
 * Preloaded into linux.uml: sets the whole of a guest process's extended registers.
 *
 * User-mode Linux of 6.1 keeps them in a buffer as large as AVX-512 makes them. On a processor with more (AMX: 11008
 * bytes) the host takes them whole or not at all, and the guest's first process dies: "ptrace set fp regs failed,
 * errno = 14". What is missing is sent as zeros: a process in the guest cannot have used it, for the permission that
 * AMX needs (arch_prctl) is nothing that the guest's kernel can give.
 *
 * Source: Linux 6.1, arch/x86/um/os-Linux/registers.c (put_fp_registers); Linux 6.12, arch/x86/kernel/fpu/regset.c
 * (xstateregs_set), kernel/ptrace.c (ptrace_regset).
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <elf.h>
#include <stdarg.h>
#include <stdint.h>
#include <string.h>
#include <sys/ptrace.h>
#include <sys/types.h>
#include <sys/uio.h>

typedef long ptrace_function(enum __ptrace_request request, ...);

static ptrace_function *real;
/* Not on the stack, which is a guest kernel thread's. One thread alone runs the guest's processes. */
static unsigned char whole[1 << 16];
static size_t whole_bytes;

__attribute__((constructor)) static void find_real(void)
{
    real = (ptrace_function *)dlsym(RTLD_NEXT, "ptrace");
}

static long set_extended(pid_t pid, void *type, struct iovec *given)
{
    if (whole_bytes == 0) {
        struct iovec all = {whole, sizeof(whole)};
        if (real(PTRACE_GETREGSET, pid, type, &all) < 0)
            return -1;
        whole_bytes = all.iov_len;
    }
    if (given->iov_len >= whole_bytes)
        return real(PTRACE_SETREGSET, pid, type, given);
    memcpy(whole, given->iov_base, given->iov_len);
    memset(whole + given->iov_len, 0, whole_bytes - given->iov_len);
    struct iovec all = {whole, whole_bytes};
    return real(PTRACE_SETREGSET, pid, type, &all);
}

long ptrace(enum __ptrace_request request, ...)
{
    va_list arguments;
    va_start(arguments, request);
    pid_t pid = va_arg(arguments, pid_t);
    void *address = va_arg(arguments, void *);
    void *data = va_arg(arguments, void *);
    va_end(arguments);
    if (request == PTRACE_SETREGSET && (uintptr_t)address == NT_X86_XSTATE)
        return set_extended(pid, address, data);
    return real(request, pid, address, data);
}
