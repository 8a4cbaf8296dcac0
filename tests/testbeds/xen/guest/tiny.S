/*
 * A PVH guest that needs 4 MB and no driver at all. It counts in the word at 2 MiB and writes the count into the eight
 * pages behind it, for ever: what a checkpoint has caught is seen from outside.
 */
        .code32
        .globl  start
start:  cli
        movl    $0x200000, %ebx
again:  incl    (%ebx)
        movl    (%ebx), %eax
        xorl    %ecx, %ecx
page:   addl    $0x1000, %ecx
        movl    %eax, (%ebx,%ecx)
        cmpl    $0x8000, %ecx
        jne     page
        movl    $200000, %ecx
idle:   pause
        loop    idle
        jmp     again

/* XEN_ELFNOTE_PHYS32_ENTRY, public/elfnote.h */
        .section .note.Xen, "a", @note
        .long   4, 4, 18
        .asciz  "Xen"
        .long   start
        .section .note.GNU-stack, "", @progbits
