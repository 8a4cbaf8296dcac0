# A guest in one sector: counts BIOS ticks, writes each count on every disk, then prints it.
#
# Count n goes to block 1 + n mod 1024 of drive 0x80, then 0x81 ..., eight bytes: n and "CNTR"; then n goes to COM1 as
# eight hexadecimal digits and a newline ("E" before them if a write failed). Everything runs in real mode, so that it
# works under every KVM and under TCG.
    .code16
    .globl _start
_start:
    cli
    xorw %ax, %ax
    movw %ax, %ds
    movw %ax, %es
    movw %ax, %ss
    movw $0x7c00, %sp
    sti
again:
    incl count
    movl count, %eax
    movl %eax, buffer
    movl $0x52544e43, buffer + 4
    andl $1023, %eax
    incl %eax
    movl %eax, block
    movb $0x80, drive
each:
    movw $packet, %si
    movb drive, %dl
    movb $0x43, %ah
    xorb %al, %al
    int $0x13
    jnc good
    movb $'E', %al
    movw $0x3f8, %dx
    outb %al, %dx
good:
    incb drive
    movb drive, %al
    subb $0x80, %al
    cmpb 0x475, %al             # the BIOS's number of disks
    jb each
    movl count, %ebx
    movw $8, %cx
digit:
    roll $4, %ebx
    movb %bl, %al
    andb $15, %al
    addb $'0', %al
    cmpb $'9', %al
    jbe print
    addb $39, %al
print:
    movw $0x3f8, %dx
    outb %al, %dx
    decw %cx
    jnz digit
    movb $'\n', %al
    outb %al, %dx
    movl 0x46c, %eax            # the BIOS's tick, 18.2 in a second
tick:
    hlt
    cmpl 0x46c, %eax
    je tick
    jmp again

drive:  .byte 0
count:  .long 0
packet: .byte 16, 0
        .word 1
        .word buffer, 0
block:  .long 0, 0

    .org 510
    .word 0xaa55
    .set buffer, 0x8000
