# The benchmark's guest: ring 3, 64 bits, position independent, no stack. RDI is the vCPU's number.
#
# It turns in a loop that reads the time stamp counter, and does, when their time has come, two things: write to one page,
# send one byte. What it is to do and what it has done stand in its block (guest.rs has the layout), which the benchmark
# reads and writes from outside, through the file that the guest's RAM is.
#
# r15 block   r14 TSC at the last turn   r13 when the next page is due   r12 page in this round   r11 start of the window
# r10 turns without work: the guest's progress   rbp when the next byte is due   rbx random numbers

    mov     r15, rdi
    shl     r15, 12
    add     r15, 0x110000
    xor     r10d, r10d
    xor     r11d, r11d
    xor     r12d, r12d
    xor     ebp, ebp
    lea     rbx, [rdi + 0x1e3779b9]
    rdtsc
    shl     rdx, 32
    or      rax, rdx
    mov     r14, rax
    mov     r13, rax
    cld
    test    rdi, rdi
    jnz     20f
    # COM1: 115200 8N1. A byte that waits for its time on the line is not what is measured here.
    mov     edx, 0x3fb
    mov     eax, 0x83
    out     dx, al
    mov     edx, 0x3f8
    mov     eax, 1
    out     dx, al
    mov     edx, 0x3f9
    xor     eax, eax
    out     dx, al
    mov     edx, 0x3fb
    mov     eax, 3
    out     dx, al

# One turn.
20: rdtsc
    shl     rdx, 32
    or      rax, rdx
    mov     rcx, rax
    sub     rcx, r14
    mov     r14, rax
    mov     [r15 + 0x100], rax          # now
    cmp     rcx, [r15 + 0x58]
    ja      30f
21: cmp     qword ptr [r15], 0
    je      22f
    cmp     rax, r13
    jae     40f
22: inc     r10
    mov     [r15 + 0x108], r10
    mov     rcx, [r15 + 0x60]
    test    rcx, rcx
    jz      20b
    cmp     rax, rbp
    jb      20b
    # A byte is due; its number is its content, and its birth is noted before it is sent.
    mov     edx, 0x3fd
    in      al, dx
    test    al, 0x20
    jz      20b
    rdtsc
    shl     rdx, 32
    or      rax, rdx
    lea     rbp, [rax + rcx]
    mov     rcx, [r15 + 0x140]
    mov     esi, ecx
    and     esi, 127
    mov     [r15 + rsi*8 + 0x200], rax
    mov     eax, ecx
    mov     edx, 0x3f8
    out     dx, al
    inc     rcx
    mov     [r15 + 0x140], rcx
    jmp     20b

# The last turn took longer than a turn can: somebody had stopped this vCPU.
30: add     [r15 + 0x118], rcx
    inc     qword ptr [r15 + 0x120]
    cmp     rcx, [r15 + 0x128]
    jbe     21b
    mov     [r15 + 0x128], rcx
    jmp     21b

# A page is due. The load is an offered one: what was missed is made up for, but never more than one round of it.
40: add     r13, [r15 + 0x08]
    mov     rcx, rax
    sub     rcx, r13
    jbe     41f
    cmp     rcx, [r15 + 0x10]
    jbe     41f
    sub     rcx, [r15 + 0x10]
    add     r13, rcx
    add     [r15 + 0x138], rcx
41: lea     r9, [r11 + r12]
    imul    r9, [r15 + 0x28]
    and     r9, [r15 + 0x20]
    shl     r9, 12
    add     r9, [r15 + 0x18]
    mov     r8, [r15 + 0x50]
# One patch: from a random place in the pool to a random place in the page.
42: mov     rax, 6364136223846793005
    imul    rbx, rax
    add     rbx, 0x14057b7e
    mov     rsi, rbx
    shr     rsi, 33
    and     rsi, [r15 + 0x40]
    add     rsi, [r15 + 0x38]
    mov     rcx, [r15 + 0x48]
    mov     eax, 512
    sub     rax, rcx
    mov     rdx, rbx
    shr     rdx, 24
    and     edx, 511
    cmp     rdx, rax
    cmova   rdx, rax
    lea     rdi, [r9 + rdx*8]
    rep movsq
    dec     r8
    jnz     42b
    inc     qword ptr [r15 + 0x110]
    inc     r12
    cmp     r12, [r15]
    jb      20b
    xor     r12d, r12d
    add     r11, [r15 + 0x30]
    inc     qword ptr [r15 + 0x130]
    jmp     20b
