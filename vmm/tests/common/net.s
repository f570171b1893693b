# A guest that asks and waits for its answer over the network: ring 3, 64 bits, one vCPU, no interrupts, no stack. Its card is in slot 17 of the bus.
#
# It sets the card up as a driver does. Then, for n = 1, 2, …: it sends a frame to everybody (type 0x88b5) with n in it and waits until a frame arrives that
# has n at the same place; every so often it asks again. So a number that it has passed was seen outside and came back.
#
# n stands at 0x200000. Sending: rings at 0x300000 (descriptors), 0x301000 (driver), 0x302000 (device), header and frame at 0x303000. Receiving: rings at
# 0x304000, 0x305000, 0x306000, buffer at 0x308000.
#
# r8 registers of the card   r9 0x300000   r10 0x303000   r11 0x308000   r12 0x200000   r13 0x301000   r14 0x305000   rsi 0x306000   ebx frames awaited

    mov     r8d, 0xc0000000
    mov     r9d, 0x300000
    mov     r10d, 0x303000
    mov     r11d, 0x308000
    mov     r12d, 0x200000
    mov     r13d, 0x301000
    mov     r14d, 0x305000
    mov     esi, 0x306000
    virtio_plug 17, 0xc0000000
    virtio_begin 0
    # Queue 0 receives, queue 1 sends.
    virtio_queue 0, 0x304000, 0x305000, 0x306000
    virtio_queue 1, 0x300000, 0x301000, 0x302000
    virtio_ready
    # No interrupts; one buffer each way.
    mov     word ptr [r13], 1
    mov     word ptr [r14], 1
    mov     [r9], r10
    mov     dword ptr [r9 + 8], 72
    mov     dword ptr [r9 + 12], 0
    mov     [r9 + 0x4000], r11
    mov     dword ptr [r9 + 0x4008], 2048
    mov     dword ptr [r9 + 0x400c], 2
    mov     word ptr [r14 + 2], 1
    mov     word ptr [r8 + 0x3000], 0
    # To everybody, from 02:00:00:00:00:01.
    mov     dword ptr [r10 + 12], 0xffffffff
    mov     dword ptr [r10 + 16], 0x0002ffff
    mov     dword ptr [r10 + 20], 0x01000000
    mov     word ptr [r10 + 24], 0xb588
    mov     qword ptr [r12], 1
    mov     ebx, 1

    # Ask.
20: mov     rax, [r12]
    mov     [r10 + 26], rax
    inc     word ptr [r13 + 2]
    mov     word ptr [r8 + 0x3004], 1
    mov     ecx, 2000000
    # Wait; ask again when it takes long.
21: pause
    cmp     word ptr [rsi + 2], bx
    je      22f
    dec     ecx
    jnz     21b
    jmp     20b
    # Something came. The buffer is the card's again, after a look.
22: mov     rdx, [r11 + 26]
    mov     qword ptr [r11 + 26], 0
    inc     ebx
    inc     word ptr [r14 + 2]
    mov     word ptr [r8 + 0x3000], 0
    cmp     rdx, [r12]
    jne     21b
    inc     qword ptr [r12]
    jmp     20b
