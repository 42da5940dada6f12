; The set-up for Windows, for one person, without administrator's rights. `python -m installer.build --only windows`
; compiles it. The tray runs natively. The worker runs in WSL2, because hivemind has no native form for Windows.
Unicode true
; The 64-bit stub: Windows runs both, and a Wine without 32-bit parts runs this one only.
Target amd64-unicode
Name "swarmkit"
OutFile "${OUT}"
RequestExecutionLevel user
InstallDir "$LOCALAPPDATA\Programs\swarmkit"
SetCompressor /SOLID ${COMPRESSOR}
Icon "swarmkit.ico"
UninstallIcon "swarmkit.ico"
!include "MUI2.nsh"
!include "FileFunc.nsh"
!define KEY "Software\Microsoft\Windows\CurrentVersion\Uninstall\swarmkit"
!define RUN "Software\Microsoft\Windows\CurrentVersion\Run"

!define MUI_WELCOMEPAGE_TEXT "swarmkit lends this computer to a swarm that runs language models, while you do not need it.$\r$\n$\r$\nIt starts paused, and lends nothing before you have chosen it. The part that computes runs in the Windows Subsystem for Linux (WSL2). At the first start several gigabytes are downloaded."
!insertmacro MUI_PAGE_WELCOME
!insertmacro MUI_PAGE_COMPONENTS
!insertmacro MUI_PAGE_INSTFILES
!insertmacro MUI_UNPAGE_CONFIRM
!insertmacro MUI_UNPAGE_COMPONENTS
!insertmacro MUI_UNPAGE_INSTFILES
!insertmacro MUI_LANGUAGE "English"

Section "swarmkit" SecMain
  SectionIn RO
  SetOutPath "$INSTDIR"
  Delete "$INSTDIR\*.whl"
  Delete "$INSTDIR\*.tar.gz"
  File uv.exe
  File swarmkit.ico
  File swarmkit.cmd
  File install-worker.cmd
  File tray-requirements.txt
  File id.txt
  File "${WHEEL}"
  File "${TARBALL}"
  WriteUninstaller "$INSTDIR\uninstall.exe"
  CreateDirectory "$SMPROGRAMS\swarmkit"
  CreateShortcut "$SMPROGRAMS\swarmkit\swarmkit.lnk" "$INSTDIR\swarmkit.cmd" "tray" "$INSTDIR\swarmkit.ico" 0 SW_SHOWMINIMIZED
  CreateShortcut "$SMPROGRAMS\swarmkit\Install the worker in WSL2.lnk" "$INSTDIR\install-worker.cmd" "" "$INSTDIR\swarmkit.ico"
  CreateShortcut "$SMPROGRAMS\swarmkit\Remove swarmkit.lnk" "$INSTDIR\uninstall.exe"
  WriteRegStr HKCU "${KEY}" "DisplayName" "swarmkit"
  WriteRegStr HKCU "${KEY}" "DisplayVersion" "${VERSION}"
  WriteRegStr HKCU "${KEY}" "DisplayIcon" "$INSTDIR\swarmkit.ico"
  WriteRegStr HKCU "${KEY}" "Publisher" "The swarmkit developers"
  WriteRegStr HKCU "${KEY}" "UninstallString" '"$INSTDIR\uninstall.exe"'
  WriteRegStr HKCU "${KEY}" "QuietUninstallString" '"$INSTDIR\uninstall.exe" /S'
  WriteRegStr HKCU "${KEY}" "InstallLocation" "$INSTDIR"
  WriteRegDWORD HKCU "${KEY}" "NoModify" 1
  WriteRegDWORD HKCU "${KEY}" "NoRepair" 1
SectionEnd

; Off unless chosen. An upgrade neither switches it on nor off: the section only ever adds.
Section /o "Start when I log in" SecStart
  WriteRegStr HKCU "${RUN}" "swarmkit-tray" '"$INSTDIR\swarmkit.cmd" tray'
SectionEnd

; Goes first, while the programs are there that know what belongs to them. `/KEEP` on the command line leaves it out.
Section "un.Settings, keys, history and weights" UnData
  nsExec::Exec '"$INSTDIR\swarmkit.cmd" uninstall --yes'
  Pop $0
  nsExec::Exec 'wsl.exe -e sh -lc "~/.local/bin/swarmkit uninstall --yes"'
  Pop $0
  RMDir /r "$LOCALAPPDATA\swarmkit"
SectionEnd

Section "un.swarmkit" UnMain
  SectionIn RO
  ; Tray and worker end politely, here and in WSL2.
  nsExec::Exec '"$INSTDIR\swarmkit.cmd" --end'
  Pop $0
  nsExec::Exec 'wsl.exe -e sh -lc "~/.local/bin/swarmkit uninstall --yes --keep settings,identity,weights,history"'
  Pop $0
  DeleteRegValue HKCU "${RUN}" "swarmkit-tray"
  DeleteRegKey HKCU "${KEY}"
  RMDir /r "$SMPROGRAMS\swarmkit"
  RMDir /r "$LOCALAPPDATA\swarmkit\swarmkit\envs"
  Delete "$INSTDIR\uv.exe"
  Delete "$INSTDIR\swarmkit.ico"
  Delete "$INSTDIR\swarmkit.cmd"
  Delete "$INSTDIR\install-worker.cmd"
  Delete "$INSTDIR\tray-requirements.txt"
  Delete "$INSTDIR\id.txt"
  Delete "$INSTDIR\*.whl"
  Delete "$INSTDIR\*.tar.gz"
  Delete "$INSTDIR\uninstall.exe"
  RMDir "$INSTDIR"
  RMDir "$LOCALAPPDATA\swarmkit\swarmkit"
  RMDir "$LOCALAPPDATA\swarmkit"
SectionEnd

Function un.onInit
  ${GetParameters} $0
  ClearErrors
  ${GetOptions} $0 "/KEEP" $1
  IfErrors done
  SectionSetFlags ${UnData} 0
done:
FunctionEnd

