# The guest of the power cuts: ring 3, 64 bits, position independent, no stack. RDI is the vCPU's number.
#
# Every vCPU goes round and round over its own pages, sees whether each still holds what it wrote a round ago, and writes the next number.
# Every 1024 pages the first vCPU sends a record of 12 bytes on COM1: number, bytes heard so far, check; and it hears bytes from COM1,
# which must count up. Whatever is wrong in memory or in what it hears it tells with records of ones, for ever.
#
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

# A record.
    mov     rax, r12
    shr     rax, 10
    mov     [r15], eax
    mov     [r15 + 4], r13d
    imul    eax, eax, 0x61c88647
    xor     eax, r13d
    mov     [r15 + 8], eax
    xor     ecx, ecx
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
