# A guest that keeps a disk: ring 3, 64 bits, one vCPU, no interrupts, no stack. Its disk is in slot 3 of the bus or, with SCSI set to 1, target 0 of the
# SCSI controller in slot 16. It has at least 64 sectors, and was all zeroes.
#
# It sets the disk up as a driver does. Then, for n = 64, 65, …: it reads sector n mod 64, which must hold n - 64 (or nothing, the first time round);
# writes n there; flushes every fourth time; says n on COM1, four bytes. So what it knows (n) and what the disk holds are compared again
# and again, and every number that is seen outside is on the disk. If they differ it writes 1 to 0x200008 and stops.
#
# n stands at 0x200000, the rings at 0x300000 (descriptors), 0x301000 (driver), 0x302000 (device), header and status (SCSI: response, 64 bytes
# further) at 0x303000, data at 0x304000.
#
# r8 registers of the disk   r9 descriptors   r10 0x303000   r11 data   r12 0x200000   r13 driver area   r14 device area

    mov     r8d, 0xc0000000
    mov     r9d, 0x300000
    mov     r10d, 0x303000
    mov     r11d, 0x304000
    mov     r12d, 0x200000
    mov     r13d, 0x301000
    mov     r14d, 0x302000
.if SCSI
    virtio_plug 16, 0xc0000000
.else
    virtio_plug 3, 0xc0000000
.endif
    # A disk can flush; SCSI needs no feature for it.
.if SCSI
    virtio_begin 0
.else
    virtio_begin 0x200
.endif
    # SCSI: 2 is the first with commands.
    virtio_queue SCSI*2, 0x300000, 0x301000, 0x302000
    virtio_ready
    # No interrupts; the buffers of every request.
    mov     word ptr [r13], 1
    mov     qword ptr [r9], r10
.if SCSI
    mov     dword ptr [r9 + 8], 51
.else
    mov     dword ptr [r9 + 8], 16
.endif
    mov     word ptr [r9 + 12], 1
    mov     qword ptr [r9 + 16], r11
    mov     dword ptr [r9 + 24], 512
    mov     word ptr [r9 + 30], 2
.if SCSI
    lea     rax, [r10 + 64]
    mov     dword ptr [r9 + 40], 108
.else
    lea     rax, [r10 + 16]
    mov     dword ptr [r9 + 40], 1
.endif
    mov     qword ptr [r9 + 32], rax
    mov     word ptr [r9 + 44], 2
    mov     qword ptr [r12], 64
.if SCSI
    # Target 0, unit 0. Is it ready? It only tells of its power on.
    mov     byte ptr [r10], 1
    mov     byte ptr [r10 + 2], 0x40
    mov     eax, 5
    xor     ebx, ebx
    lea     r15, [rip + 20f]
    jmp     80f
.endif

    # Read: n - 64, or nothing.
20: mov     rbx, [r12]
    and     ebx, 63
    mov     word ptr [r9 + 14], 1
    mov     word ptr [r9 + 28], 3
    xor     eax, eax
    lea     r15, [rip + 21f]
    jmp     80f
21: mov     rax, [r12]
    xor     ecx, ecx
    mov     rdx, rax
    sub     rdx, 64
    cmp     rax, 128
    cmovae  rcx, rdx
    cmp     [r11], rcx
    jne     90f
    cmp     [r11 + 504], rcx
    jne     90f
    # Write n.
    mov     [r11], rax
    mov     [r11 + 504], rax
    mov     rbx, rax
    and     ebx, 63
    mov     word ptr [r9 + 28], 1
    mov     eax, 1
    lea     r15, [rip + 22f]
    jmp     80f
    # Flush.
22: mov     rax, [r12]
    test    eax, 3
    jnz     23f
    mov     word ptr [r9 + 14], 2
    xor     ebx, ebx
    mov     eax, 4
    lea     r15, [rip + 23f]
    jmp     80f
    # Say n.
23: mov     rax, [r12]
    mov     [r12 + 16], rax
    xor     ecx, ecx
24: mov     edx, 0x3fd
    in      al, dx
    test    al, 0x20
    jz      24b
    mov     edx, 0x3f8
    mov     al, [r12 + rcx + 16]
    out     dx, al
    inc     ecx
    cmp     ecx, 4
    jb      24b
    inc     qword ptr [r12]
    jmp     20b

    # Ask for eax (0 read, 1 write, 4 flush, 5 ready?) at sector rbx, wait, go on at r15.
80:
.if SCSI
    # Header, response, data; or header, data, response.
    mov     word ptr [r9 + 14], 2
    mov     word ptr [r9 + 44], 2
    mov     ecx, 0x35
    cmp     eax, 4
    je      85f
    xor     ecx, ecx
    cmp     eax, 5
    je      85f
    mov     ecx, 0x2a
    cmp     eax, 1
    je      84f
    mov     word ptr [r9 + 44], 3
    mov     word ptr [r9 + 46], 1
    mov     word ptr [r9 + 28], 2
    mov     ecx, 0x28
    jmp     85f
84: mov     word ptr [r9 + 14], 1
    mov     word ptr [r9 + 28], 1
    # Operation code, address, one block.
85: mov     byte ptr [r10 + 19], cl
    mov     ecx, ebx
    bswap   ecx
    mov     dword ptr [r10 + 21], ecx
    mov     byte ptr [r10 + 27], 1
    mov     word ptr [r10 + 74], 0x7777
.else
    mov     dword ptr [r10], eax
    mov     dword ptr [r10 + 4], 0
    mov     qword ptr [r10 + 8], rbx
    mov     byte ptr [r10 + 16], 0x77
.endif
    movzx   edx, word ptr [r13 + 2]
    mov     esi, edx
    and     esi, 7
    mov     word ptr [r13 + rsi * 2 + 4], 0
    inc     edx
    mov     word ptr [r13 + 2], dx
    mov     word ptr [r8 + 0x3000], 0
81: pause
    cmp     word ptr [r14 + 2], dx
    jne     81b
.if SCSI
    cmp     byte ptr [r10 + 19], 0
    je      86f
    cmp     word ptr [r10 + 74], 0
    jne     90f
86: jmp     r15
.else
    cmp     byte ptr [r10 + 16], 0
    jne     90f
    jmp     r15
.endif

90: mov     qword ptr [r12 + 8], 1
91: pause
    jmp     91b
