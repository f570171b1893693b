# The guest that sends as much as its card takes: ring 3, 64 bits, position independent, no stack. RDI is the vCPU's number; only the first one does anything.
#
# One packet, header and frame, is behind the program at 0x100800; all 8 buffers of the transmit ring are this one. The card is in slot 17; its rings are where those
# of witness.s are. EVENT_IDX is agreed on: it notifies when the card wants it, and is never interrupted.
#
# r8  registers of the card   r9 0x180000   dx next of the available ring   cx what was used

    test    rdi, rdi
    jnz     90f
    mov     r8d, 0xc8000000
    mov     r9d, 0x180000
    virtio_plug 17, 0xc8000000
    # Address, checksums and TCP segmentation left to the card, EVENT_IDX.
    virtio_begin 0x20000821
    virtio_queue 0, 0x180000, 0x181000, 0x182000
    virtio_queue 1, 0x183000, 0x184000, 0x185000
    virtio_ready
    xor     ecx, ecx
1:  mov     eax, ecx
    shl     eax, 4
    mov     qword ptr [r9 + rax + 0x3000], 0x100800
    mov     dword ptr [r9 + rax + 0x3008], 65026
    mov     word ptr [r9 + rcx * 2 + 0x4004], cx
    inc     ecx
    cmp     ecx, 8
    jb      1b
    xor     edx, edx

10: movzx   ecx, word ptr [r9 + 0x5002]
    # Interrupts are wanted from far ahead on: never.
    lea     eax, [rcx + 0x4000]
    mov     word ptr [r9 + 0x4014], ax
    lea     eax, [rcx + 8]
    and     eax, 0xffff
    cmp     eax, edx
    je      12f
    mov     esi, edx
    mov     edx, eax
    mov     word ptr [r9 + 0x4002], dx
    mfence
    # Whether the index that the card waits for is among the new ones (virtio 1.2, 2.7.10).
    movzx   ecx, word ptr [r9 + 0x5044]
    mov     edi, edx
    sub     edi, ecx
    dec     edi
    and     edi, 0xffff
    mov     eax, edx
    sub     eax, esi
    and     eax, 0xffff
    cmp     edi, eax
    jae     10b
    mov     word ptr [r8 + 0x3004], 1
    jmp     10b
12: pause
    jmp     10b

90: pause
    jmp     90b
