# The guest of the power cuts: ring 3, 64 bits, position independent, no stack. RDI is the vCPU's number.
#
# Every vCPU goes round and round over its own pages, sees whether each still holds what it wrote a round ago, and writes the next number.
# Every 1024 pages the first vCPU sends a record of 12 bytes on COM1: number, bytes heard so far, check; and it hears bytes from COM1,
# which must count up. Before it sends a record it looks whether sector (number mod 64) of its disk holds the number of 64 records ago (nothing,
# the first time round), writes this one there, and flushes. When it boots it reads all 64 sectors: they must be those of the newest number in them.
# It tells that number with a record of its own, and counts on from it. Whatever is wrong in memory, on the disk or in what it hears it tells with
# records of ones, for ever.
#
# The disk is in slot 3 of the bus. Its rings are at 0x180000 (descriptors), 0x181000 (driver), 0x182000 (device), header and status of its one request
# at 0x183000, data at 0x184000; what the sectors held at boot is at 0x185000, the newest number of then behind the record.
#
# r8  registers of the disk   r9  descriptors   r10 0x183000   rdi number of the record
# r12 number of the next page   r13 bytes heard   r14 the vCPU's pages   r15 the first vCPU's record   r11 the vCPU's number

    mov     r11, rdi
    mov     r14, rdi
    shl     r14, 22
    add     r14, 0x400000
    mov     r15d, 0x110000
    xor     r12d, r12d
    xor     r13d, r13d
    test    r11, r11
    jnz     20f
    # COM1: 115200 8N1, ready to hear (DTR, RTS).
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
    mov     edx, 0x3fc
    out     dx, al
    # The disk.
    mov     r8d, 0xc8000000
    mov     r9d, 0x180000
    mov     r10d, 0x183000
    virtio_plug 3, 0xc8000000
    # It can flush.
    virtio_begin 0x200
    virtio_queue 0, 0x180000, 0x181000, 0x182000
    virtio_ready
    # No interrupts; header, data and status of every request.
    mov     word ptr [r9 + 0x1000], 1
    mov     qword ptr [r9], r10
    mov     dword ptr [r9 + 8], 16
    mov     word ptr [r9 + 12], 1
    mov     qword ptr [r9 + 16], 0x184000
    mov     dword ptr [r9 + 24], 512
    mov     word ptr [r9 + 30], 2
    mov     qword ptr [r9 + 32], 0x183010
    mov     dword ptr [r9 + 40], 1
    mov     word ptr [r9 + 44], 2

# What the disk knows.
    xor     ebx, ebx
80: mov     word ptr [r9 + 14], 1
    mov     word ptr [r9 + 28], 3
    xor     eax, eax
    lea     rbp, [rip + 81f]
    jmp     70f
81: mov     rcx, [r10 + 0x1000]
    cmp     rcx, [r10 + 0x11f8]
    jne     40f
    mov     [r10 + rbx * 8 + 0x2000], rcx
    cmp     rcx, [r15 + 0x810]
    jbe     82f
    mov     [r15 + 0x810], rcx
82: inc     ebx
    cmp     ebx, 64
    jb      80b
    # Sector i has the newest number that leaves i when divided by 64; nothing if there was none.
    mov     rdi, [r15 + 0x810]
    xor     ebx, ebx
83: mov     rcx, rdi
    sub     rcx, rbx
    and     ecx, 63
    xor     edx, edx
    mov     rax, rdi
    sub     rax, rcx
    cmovb   rax, rdx
    cmp     [r10 + rbx * 8 + 0x2000], rax
    jne     40f
    inc     ebx
    cmp     ebx, 64
    jb      83b
    mov     [r15], edi
    mov     [r15 + 4], r13d
    imul    eax, edi, 0x61c88647
    not     eax
    mov     [r15 + 8], eax
    jmp     29f

# A page.
20: cmp     dword ptr [r15 + 0x800], 0
    jne     50f
    mov     rsi, r12
    and     esi, 511
    shl     rsi, 12
    add     rsi, r14
    xor     edx, edx
    mov     rcx, r12
    sub     rcx, 512
    cmovae  rdx, rcx
    cmp     [rsi], rdx
    jne     40f
    imul    rdx, rdx, 0x61c88647
    cmp     [rsi + 2048], rdx
    jne     40f
    mov     [rsi], r12
    imul    rdx, r12, 0x61c88647
    mov     [rsi + 2048], rdx
    inc     r12
    test    r12d, 1023
    jnz     20b
    test    r11, r11
    jnz     20b

# Its number on the disk: what stands there first.
    mov     rdi, r12
    shr     rdi, 10
    add     rdi, [r15 + 0x810]
    mov     ebx, edi
    and     ebx, 63
    mov     word ptr [r9 + 14], 1
    mov     word ptr [r9 + 28], 3
    xor     eax, eax
    lea     rbp, [rip + 60f]
    jmp     70f
60: xor     ecx, ecx
    mov     rdx, rdi
    sub     rdx, 64
    cmp     rdi, 64
    cmova   rcx, rdx
    cmp     [r10 + 0x1000], rcx
    jne     40f
    cmp     [r10 + 0x11f8], rcx
    jne     40f
    mov     [r10 + 0x1000], rdi
    mov     [r10 + 0x11f8], rdi
    mov     word ptr [r9 + 28], 1
    mov     eax, 1
    lea     rbp, [rip + 61f]
    jmp     70f
61: mov     word ptr [r9 + 14], 2
    mov     eax, 4
    lea     rbp, [rip + 62f]
    jmp     70f

# A record.
62: mov     [r15], edi
    mov     [r15 + 4], r13d
    imul    eax, edi, 0x61c88647
    xor     eax, r13d
    mov     [r15 + 8], eax
29: xor     ecx, ecx
30: mov     edx, 0x3fd
    in      al, dx
    test    al, 1
    jz      31f
    mov     edx, 0x3f8
    in      al, dx
    cmp     al, r13b
    jne     40f
    inc     r13d
    jmp     30b
31: test    al, 0x20
    jz      30b
    mov     edx, 0x3f8
    mov     al, [r15 + rcx]
    out     dx, al
    inc     ecx
    cmp     ecx, 12
    jb      30b
    jmp     20b

# Ask the disk for eax at sector rbx, wait, go on at rbp.
70: mov     dword ptr [r10], eax
    mov     dword ptr [r10 + 4], 0
    mov     qword ptr [r10 + 8], rbx
    mov     byte ptr [r10 + 16], 0x77
    movzx   edx, word ptr [r9 + 0x1002]
    mov     esi, edx
    and     esi, 7
    mov     word ptr [r9 + rsi * 2 + 0x1004], 0
    inc     edx
    mov     word ptr [r9 + 0x1002], dx
    mov     word ptr [r8 + 0x3000], 0
71: pause
    cmp     word ptr [r9 + 0x2002], dx
    jne     71b
    cmp     byte ptr [r10 + 16], 0
    jne     40f
    jmp     rbp

# Something is wrong: the first vCPU tells it.
40: mov     dword ptr [r15 + 0x800], 1
50: test    r11, r11
    jnz     50b
51: mov     edx, 0x3fd
    in      al, dx
    test    al, 0x20
    jz      51b
    mov     edx, 0x3f8
    mov     eax, 0xff
    out     dx, al
    jmp     51b
