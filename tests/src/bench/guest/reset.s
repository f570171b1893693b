# What QEMU's guest runs in place of a BIOS: from the reset vector to ring 3 at 0x100000, with the machine in the state in
# which `BootSource::Flat` starts a guest of understudy-vmm. 64 KiB, at the top of the first 4 GiB. It leaves ring 0 by SYSEXIT,
# because software-paged KVM interprets ring 0, and its interpreter knows no other way out.

    .code16
51: cli
    # o32 lgdt cs:[gdtr]
    .byte   0x2e, 0x66, 0x0f, 0x01, 0x16
    .word   59f - 51b
    mov     eax, cr0
    or      al, 1
    mov     cr0, eax
    # jmp 8:52f
    .byte   0x66, 0xea
    .long   0xffff0000 + (52f - 51b)
    .word   8
    .code32
52: mov     eax, 0x10
    mov     ds, eax
    mov     es, eax
    mov     ss, eax
    mov     esp, 0x8ff0
    cld
    # Identity page tables for 4 GiB in pages of 2 MiB, open to ring 3.
    xor     eax, eax
    mov     edi, 0x9000
    mov     ecx, 6 * 1024
    rep stosd
    mov     dword ptr [0x9000], 0xa007
    mov     eax, 0xb007
    mov     edi, 0xa000
    mov     ecx, 4
53: mov     [edi], eax
    add     eax, 0x1000
    add     edi, 8
    dec     ecx
    jnz     53b
    mov     eax, 0x87
    mov     edi, 0xb000
    mov     ecx, 2048
54: mov     [edi], eax
    add     eax, 0x200000
    add     edi, 8
    dec     ecx
    jnz     54b
    mov     eax, 0x9000
    mov     cr3, eax
    mov     eax, 0x220                  # PAE, OSFXSR
    mov     cr4, eax
    mov     ecx, 0xc0000080             # EFER: long mode
    rdmsr
    or      eax, 0x100
    wrmsr
    mov     eax, 0x80010031             # paging, write protection, numeric errors, protected mode
    mov     cr0, eax
    # jmp 0x18:55f
    .byte   0xea
    .long   0xffff0000 + (55f - 51b)
    .word   0x18
    .code64
55: mov     ecx, 0x174                  # SYSENTER_CS: SYSEXIT takes the selectors 32 and 40 behind it
    mov     eax, 8
    xor     edx, edx
    wrmsr
    push    0x3002                      # ring 3 may use the ports
    popfq
    xor     edi, edi
    mov     edx, 0x100000
    mov     ecx, 0x8ff0
    .byte   0x48, 0x0f, 0x35            # sysexit, 64 bits
    .balign 8
58: .quad   0
    .quad   0x00cf9b000000ffff          # 0x08 code, 32 bits
    .quad   0x00cf93000000ffff          # 0x10 data
    .quad   0x00af9b000000ffff          # 0x18 code, 64 bits
    .quad   0
    .quad   0x00affb000000ffff          # 0x28 code of ring 3, 64 bits
    .quad   0x00cff3000000ffff          # 0x30 data of ring 3
59: .word   7 * 8 - 1
    .long   0xffff0000 + (58b - 51b)
    .zero   0xfff0 - (. - 51b)
    # The reset vector.
    .byte   0xe9
    .word   0x10000 - 0xfff3
    .zero   0x10000 - (. - 51b)
    .code64
