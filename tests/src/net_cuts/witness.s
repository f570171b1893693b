# The guest of the network's power cuts: ring 3, 64 bits, position independent, no stack. RDI is the vCPU's number; only the first one does anything.
#
# It counts. Each step raises the witness, writes it to one of 512 pages (which must hold the witness of 512 steps ago, or nothing), and sends a frame with it:
# to everybody by itself, or to whoever asked, with the number of the question. What is wrong in memory it tells with another frame, for ever.
#
# The card is in slot 17 of the bus. Its receive rings are at 0x180000 (descriptors), 0x181000 (driver), 0x182000 (device), the transmit rings at 0x183000,
# 0x184000, 0x185000; buffers of 2 KiB from 0x190000 (received) and 0x1a0000 (sent). Frames with their headers are behind the program: what it tells at
# 0x100800, an answer at 0x100900, a complaint at 0x100a00.
#
# r8  registers of the card   r9 0x180000   r10 what is told   r11 what is answered   r12 a received buffer   r13 time until the next step
# r14 pages   r15 witness; questions answered (+8), received (+16)   rbx number of a question   rbp where to go on

    test    rdi, rdi
    jnz     90f
    mov     r8d, 0xc8000000
    mov     r9d, 0x180000
    mov     r10d, 0x100800
    mov     r11d, 0x100900
    mov     r14d, 0x400000
    mov     r15d, 0x110000
    virtio_plug 17, 0xc8000000
    # An address of its own.
    virtio_begin 0x20
    virtio_queue 0, 0x180000, 0x181000, 0x182000
    virtio_queue 1, 0x183000, 0x184000, 0x185000
    virtio_ready
    # No interrupts. All receive buffers are the device's; those to be sent come in turn.
    mov     word ptr [r9 + 0x1000], 1
    mov     word ptr [r9 + 0x4000], 1
    xor     ecx, ecx
1:  mov     eax, ecx
    shl     eax, 4
    mov     edx, ecx
    shl     edx, 11
    lea     rsi, [rdx + 0x190000]
    mov     [r9 + rax], rsi
    mov     dword ptr [r9 + rax + 8], 2048
    mov     word ptr [r9 + rax + 12], 2
    lea     rsi, [rdx + 0x1a0000]
    mov     [r9 + rax + 0x3000], rsi
    mov     dword ptr [r9 + rax + 0x3008], 94
    mov     word ptr [r9 + rcx * 2 + 0x1004], cx
    mov     word ptr [r9 + rcx * 2 + 0x4004], cx
    inc     ecx
    cmp     ecx, 8
    jb      1b
    mov     word ptr [r9 + 0x1002], 8
    mov     word ptr [r8 + 0x3000], 0

# A step of its own; then a while in which questions are answered.
10: xor     ebx, ebx
    mov     rsi, r10
    lea     rbp, [rip + 11f]
    jmp     60f
11: mov     r13d, 20000
12: pause
    movzx   eax, word ptr [r9 + 0x2002]
    cmp     ax, word ptr [r15 + 16]
    jne     30f
13: dec     r13d
    jnz     12b
    jmp     10b

# Something was received. A question begins with 0x2153414b (ASK!) twice.
30: movzx   eax, word ptr [r15 + 16]
    and     eax, 7
    mov     r12d, dword ptr [r9 + rax * 8 + 0x2004]
    and     r12d, 7
    mov     edi, r12d
    shl     edi, 11
    add     edi, 0x190000
    cmp     dword ptr [rdi + 54], 0x2153414b
    jne     31f
    cmp     dword ptr [rdi + 58], 0x2153414b
    jne     31f
    mov     rbx, [rdi + 62]
    inc     qword ptr [r15 + 8]
    mov     rsi, r11
    lea     rbp, [rip + 31f]
    jmp     60f
31: movzx   edx, word ptr [r9 + 0x1002]
    mov     eax, edx
    and     eax, 7
    mov     word ptr [r9 + rax * 2 + 0x1004], r12w
    inc     edx
    mov     word ptr [r9 + 0x1002], dx
    inc     word ptr [r15 + 16]
    mov     word ptr [r8 + 0x3000], 0
    jmp     13b

# The witness, its page, and the frame at rsi with the question rbx; then on at rbp.
60: inc     qword ptr [r15]
    mov     rax, [r15]
    mov     edi, eax
    and     edi, 511
    shl     edi, 12
    add     rdi, r14
    xor     edx, edx
    mov     rcx, rax
    sub     rcx, 512
    cmova   rdx, rcx
    cmp     [rdi], rdx
    jne     80f
61: mov     [rdi], rax
    movzx   edx, word ptr [r9 + 0x4002]
62: pause
    mov     edi, edx
    movzx   ecx, word ptr [r9 + 0x5002]
    sub     edi, ecx
    and     edi, 0xffff
    cmp     edi, 8
    jae     62b
    mov     edi, edx
    and     edi, 7
    shl     edi, 11
    add     edi, 0x1a0000
    xor     ecx, ecx
63: mov     rax, [rsi + rcx * 8]
    mov     [rdi + rcx * 8], rax
    inc     ecx
    cmp     ecx, 12
    jb      63b
    mov     rax, [r15]
    mov     [rdi + 62], rax
    mov     rax, [r15 + 8]
    mov     [rdi + 70], rax
    mov     [rdi + 78], rbx
    inc     edx
    mov     word ptr [r9 + 0x4002], dx
    mov     word ptr [r8 + 0x3004], 1
    jmp     rbp

# Memory is not as it was left: from now on nothing else is told.
80: mov     r10d, 0x100a00
    mov     r11d, r10d
    mov     esi, r10d
    jmp     61b

90: pause
    jmp     90b
